"""What a home is told, and what it wants done: the words between ``Home`` and its shell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from instance.migration.messages import ClaimOutcome
from instance.request import FinishReason, TokenLogprobs


class Peer(NamedTuple):
    """One incarnation of an instance: where a stream leads."""

    instance_id: str
    incarnation: str


class Held(NamedTuple):
    """One line of an instance's holdings.

    Attributes:
        state: A ``SequenceStatus`` value.
        charged_prompt: Prompt tokens that the tenant has paid for.
    """

    request_id: str
    epoch: int
    state: str
    next_index: int
    charged_prompt: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """Find an instance for the request; answered with ``placed`` or, failing, ``close``.

    ``avoid`` names instances that have failed this request.
    """

    request_id: str
    epoch: int
    avoid: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Deliver:
    """The next output tokens for the client, in order and once; the last have a reason.

    ``index`` is the output index of the first token. ``tokens`` may be the caller's own
    sequence and is not to be changed. ``logprobs`` has one for each of them, or is empty.
    """

    request_id: str
    index: int
    tokens: Sequence[int]
    finish_reason: FinishReason = FinishReason.NOT_FINISHED
    message: str = ""
    cached_tokens: int = 0
    logprobs: Sequence[TokenLogprobs] = ()


@dataclass(frozen=True, slots=True)
class SendSubmit:
    """Submit the request with its output so far; dropped where the stream is down."""

    peer: Peer
    request_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class SendCancel:
    """This epoch of the request and all older ones are void; dropped if the stream is down."""

    peer: Peer
    request_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class SendClaimReply:
    """Answer a claim; dropped where the stream is down (the claim is repeated)."""

    peer: Peer
    request_id: str
    epoch: int
    attempt: str
    outcome: ClaimOutcome
    new_epoch: int = 0
    next_index: int = 0


@dataclass(frozen=True, slots=True)
class SendAsk:
    """The home has all output before ``index`` and lacks what follows, if there is any."""

    peer: Peer
    request_id: str
    epoch: int
    index: int


HomeAction = Place | Deliver | SendSubmit | SendCancel | SendClaimReply | SendAsk
