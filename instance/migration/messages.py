"""Vocabulary of live migration: wire messages, local events, and the actions of both sides.

The messages map one to one onto ``protos/migration.proto`` and ``protos/generate.proto``;
what the state machines do not need (model description, prompt, sampling parameters) is
added by the shell from the sequence. Block counts and indexes are positions in the
sequence's block table, token indexes are positions in its output.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from instance.request import TokenLogprobs

# ---- source to destination


@dataclass(frozen=True, slots=True)
class Offer:
    """Will the destination take this request? ``num_blocks`` is 0 where it holds no KV."""

    attempt: str
    request_id: str
    epoch: int
    home: str
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Extend:
    """``num_blocks`` blocks are wanted in all, more than reserved so far."""

    attempt: str
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Announce:
    """Handover follows after the source's current step."""

    attempt: str
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Handover:
    """The sequence has left the source's batch; the destination may claim it.

    Attributes:
        epoch: The epoch to claim from.
        num_blocks: Leading blocks of the block table that hold its KV.
        num_computed: Tokens whose KV they hold.
        num_stages: Copy stages 0 .. num_stages - 1 must have been written first.
        output: Every output token known.
        acked: Leading output tokens that the home has acknowledged.
        logprobs: One for each token of the rest, or none.
    """

    attempt: str
    request_id: str
    epoch: int
    num_blocks: int
    num_computed: int
    num_stages: int
    output: tuple[int, ...]
    acked: int
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class CancelMigration:
    """The sender has given the attempt up (either direction)."""

    attempt: str
    reason: str


# ---- destination to source


@dataclass(frozen=True, slots=True)
class Accept:
    """The blocks are reserved; the first ``cached_blocks`` need not be sent."""

    attempt: str
    cached_blocks: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """The destination does not take the request, or cannot reserve more for it."""

    attempt: str
    reason: str


@dataclass(frozen=True, slots=True)
class Extended:
    """``num_blocks`` blocks are reserved in all."""

    attempt: str
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Released:
    """The home granted the destination's claim: the source frees the sequence."""

    attempt: str


# ---- to and from the home


@dataclass(frozen=True, slots=True)
class Claim:
    """Asks the home to advance ``epoch`` by one in the sender's favour.

    ``tokens`` are all output tokens, from ``index`` on, that the home has not
    acknowledged: a claim may overtake the frame that carries them. ``logprobs`` has one for
    each, or is empty.
    """

    request_id: str
    epoch: int
    attempt: str
    index: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


class ClaimOutcome(enum.IntEnum):
    """A home's answer to a claim; the values are those of the wire format.

    GRANTED: the claimant owns the request from now on.
    SUPERSEDED: another party holds a newer epoch.
    GONE: the request is finished, aborted or unknown.
    """

    GRANTED = 0
    SUPERSEDED = 1
    GONE = 2


@dataclass(frozen=True, slots=True)
class ClaimReply:
    """The home's answer to ``Claim(request_id, epoch, attempt)``.

    ``new_epoch`` and ``next_index`` (the first output index that the home lacks) mean
    something only where the outcome is GRANTED.
    """

    request_id: str
    epoch: int
    attempt: str
    outcome: ClaimOutcome
    new_epoch: int = 0
    next_index: int = 0


# ---- events that both sides know


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; due at ``deadline()``, harmless at any other time."""


@dataclass(frozen=True, slots=True)
class PeerLost:
    """The control stream to the other instance broke: what was in flight is lost."""


@dataclass(frozen=True, slots=True)
class HomeConnected:
    """A new stream to the home is up: what was said on the old one may be lost."""


@dataclass(frozen=True, slots=True)
class HomeGone:
    """The home has been out of reach for the grace period and counts as dead."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The home voided this epoch and all older ones, or sent a submit with a newer one."""

    epoch: int


# ---- events of the source


@dataclass(frozen=True, slots=True)
class CopyDone:
    """A copy stage ended; the destination has written all of it if ``ok``.

    Attributes:
        sealed_blocks: Leading blocks of the sequence that will not change any more.
        total_blocks: Blocks in its block table.
    """

    stage: int
    ok: bool
    sealed_blocks: int = 0
    total_blocks: int = 0


@dataclass(frozen=True, slots=True)
class Detached:
    """The sequence is out of the batch, and no launched step touches it.

    Attributes:
        total_blocks: Blocks that hold its KV.
        num_computed: Tokens whose KV they hold.
        output: Every output token, all of them emitted already.
        acked: Leading output tokens that the home has acknowledged.
        logprobs: One for each token of the rest, or none.
    """

    total_blocks: int
    num_computed: int
    output: tuple[int, ...]
    acked: int
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class DetachFailed:
    """The sequence had ended before it could be taken out of the batch."""


@dataclass(frozen=True, slots=True)
class Preempted:
    """The sequence lost its KV."""


@dataclass(frozen=True, slots=True)
class SequenceEnded:
    """The sequence finished or failed on this instance."""


# ---- events of the destination


@dataclass(frozen=True, slots=True)
class ReserveResult:
    """Outcome of ``Reserve``; ``cached_blocks`` leading blocks are held with valid KV."""

    ok: bool
    cached_blocks: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class CopyStarted:
    """The source begins to write a stage. Until ``CopyEnded`` its writes may land."""

    stage: int


@dataclass(frozen=True, slots=True)
class CopyProgress:
    """Part of a stage arrived: renews the lease."""


@dataclass(frozen=True, slots=True)
class CopyEnded:
    """No write of this stage can land any more; it is complete if ``ok``."""

    stage: int
    ok: bool


# ---- actions of both sides


@dataclass(frozen=True, slots=True)
class ToPeer:
    """Send a message to the other instance; dropped where there is no stream."""

    message: (
        Offer
        | Extend
        | Announce
        | Handover
        | CancelMigration
        | Accept
        | Refuse
        | Extended
        | Released
    )


@dataclass(frozen=True, slots=True)
class ToHome:
    """Send a claim to the home; dropped where there is no stream (it is repeated)."""

    claim: Claim


@dataclass(frozen=True, slots=True)
class Ended:
    """The attempt is over: "moved", or why the request did not move."""

    outcome: str


# ---- actions of the source


@dataclass(frozen=True, slots=True)
class CopyBlocks:
    """Send blocks [first, first + count) of the sequence as one stage.

    The blocks stay pinned until the transfer has ended, whatever becomes of the sequence
    and of the attempt. Answered with ``CopyDone``, always.
    """

    stage: int
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Detach:
    """Take the sequence out of the batch at the next step boundary.

    Answered with ``Detached`` or ``DetachFailed``, always, unless ``FreeSequence`` came
    first.
    """


@dataclass(frozen=True, slots=True)
class Resume:
    """Put the detached sequence back into the batch, under this epoch.

    ``next_index`` is the first output index that the home lacks: tokens from there on are
    sent again. None at the old epoch, where nothing was lost.
    """

    epoch: int
    next_index: int | None = None


@dataclass(frozen=True, slots=True)
class FreeSequence:
    """Forget this sequence, in the batch or out of it; its blocks become cached."""


# ---- actions of the destination


@dataclass(frozen=True, slots=True)
class Reserve:
    """Hold ``num_blocks`` blocks in all, and a batch slot; answered with ``ReserveResult``.

    The first one also checks the model, the stream to the home, the epoch (an older one
    than seen is refused), that the request is not here already, and concurrency. Blocks
    are reserved only once no launched step can touch them.
    """

    num_blocks: int


@dataclass(frozen=True, slots=True)
class FreeReservation:
    """Release every reserved block and the slot: no write can land any more."""


@dataclass(frozen=True, slots=True)
class ExpectHandover:
    """The handover is one step away: the next plan may hold a row for the sequence."""


@dataclass(frozen=True, slots=True)
class StartCompute:
    """Make the sequence from the reserved blocks and run it, emitting and charging nothing.

    Reserved blocks beyond ``handover.num_blocks`` are spare room.
    """

    handover: Handover


@dataclass(frozen=True, slots=True)
class Activate:
    """The sequence is owned here: emit its output from ``next_index`` on, under ``epoch``."""

    epoch: int
    next_index: int


@dataclass(frozen=True, slots=True)
class DropSequence:
    """Another party owns the request, or nobody: forget the sequence that was started."""


@dataclass(frozen=True, slots=True)
class RejectCopy:
    """Refuse to take a stage: nothing of it may be written."""

    stage: int


SourceEvent = (
    Accept
    | Refuse
    | Extended
    | Released
    | CancelMigration
    | ClaimReply
    | CopyDone
    | Detached
    | DetachFailed
    | Preempted
    | SequenceEnded
    | PeerLost
    | HomeConnected
    | HomeGone
    | Cancelled
    | Tick
)
SourceAction = ToPeer | ToHome | CopyBlocks | Detach | Resume | FreeSequence | Ended
DestinationEvent = (
    Offer
    | Extend
    | Announce
    | Handover
    | CancelMigration
    | ClaimReply
    | ReserveResult
    | CopyStarted
    | CopyProgress
    | CopyEnded
    | PeerLost
    | HomeConnected
    | HomeGone
    | Cancelled
    | Tick
)
DestinationAction = (
    ToPeer
    | ToHome
    | Reserve
    | FreeReservation
    | ExpectHandover
    | StartCompute
    | Activate
    | DropSequence
    | RejectCopy
    | Ended
)
