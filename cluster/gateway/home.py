"""The home of requests: who owns them, what their clients have, where they go next.

A pure core. Its gateway's shell turns wire messages into calls of ``Home`` and executes the
actions returned, in order and before the next call. It decides every ownership question of
live migration and of replay after a death.

One request is owned by at most one holder (an instance's incarnation) per epoch. The epoch
advances in two ways only: a claim is granted, or the request is replayed elsewhere. Tokens
count only from the present holder under the present epoch.

A closed request is forgotten at once: the answer to anything said of an unknown request is
the same as of a closed one (``GONE``, ``SendCancel``), so nothing has to be remembered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cluster.gateway.home_actions import (
    Deliver,
    Held,
    HomeAction,
    Peer,
    Place,
    SendAsk,
    SendCancel,
    SendClaimReply,
    SendSubmit,
)
from instance.migration.messages import ClaimOutcome
from instance.request import FinishReason, SequenceStatus, TokenLogprobs


@dataclass(slots=True, eq=False)
class OwnedRequest:
    """What the home knows of an open request. Read it, change nothing.

    Attributes:
        epoch: The present epoch.
        holder: Who may emit under it; None while a placement is sought.
        attempt: The migration attempt that brought it to its holder; "" after a submit.
        output: Output tokens that the client has.
        moves: Claims granted.
        replays: Times it was started again elsewhere.
        charged_prompt: Prompt tokens that the tenant has paid for, as far as holders told.
    """

    request_id: str
    epoch: int = 1
    holder: Peer | None = None
    attempt: str = ""
    output: list[int] = field(default_factory=list)
    moves: int = 0
    replays: int = 0
    charged_prompt: int = 0
    avoid: tuple[str, ...] = ()
    # The holder has shown that it has the request under the present epoch.
    confirmed: bool = False
    asked: int = -1
    # Tokens beyond a gap, by index, as ``Home.tokens`` got them.
    early: dict[int, tuple[Sequence[int], FinishReason, str, int, Sequence[TokenLogprobs]]] = field(
        default_factory=dict
    )
    # The submit under the present epoch: which stream, and how many submits it has seen.
    stream: int = -1
    submit_number: int = 0


@dataclass(slots=True)
class _Stream:
    """The present stream to a peer.

    ``submits`` counts what was sent on it: a snapshot of holdings says how many of these
    the instance had read, and so whether a missing request should have been in it.
    """

    number: int
    submits: int = 0
    fresh: bool = True


class Home:
    """All open requests of one gateway.

    The shell reports each stream with ``connected`` before anything read from it, and drops
    what an older stream of the same peer still delivers. There are no timers: a peer that is
    out of reach for too long is the shell's to judge, with ``gone``.
    """

    def __init__(self) -> None:
        self.requests: dict[str, OwnedRequest] = {}
        self._held: dict[Peer, dict[str, OwnedRequest]] = {}
        self._streams: dict[Peer, _Stream] = {}
        self._next_stream = 0

    # ---- requests

    def add(self, request_id: str) -> list[HomeAction]:
        """A client's request; raises ValueError if the id is in use."""
        if request_id in self.requests:
            raise ValueError(f"request id {request_id!r} is in use")
        request = self.requests[request_id] = OwnedRequest(request_id)
        return [Place(request_id, request.epoch)]

    def placed(self, request_id: str, epoch: int, peer: Peer) -> list[HomeAction]:
        """The answer to ``Place``; one that comes late or twice does nothing.

        The shell keeps a link to ``peer`` from now on, until it reports it ``gone``.
        """
        request = self.requests.get(request_id)
        if request is None or request.epoch != epoch or request.holder is not None:
            return []
        self._hand_to(request, peer, "")
        return self._submit(request, peer)

    def close(self, request_id: str) -> list[HomeAction]:
        """The client needs no more: it left, a stop string was found, or nobody can serve it."""
        request = self.requests.get(request_id)
        if request is None:
            return []
        peer = request.holder
        self._forget(request)
        return [] if peer is None else [SendCancel(peer, request_id, request.epoch)]

    # ---- what instances say

    def tokens(
        self,
        peer: Peer,
        request_id: str,
        epoch: int,
        index: int,
        tokens: Sequence[int],
        finish_reason: FinishReason = FinishReason.NOT_FINISHED,
        message: str = "",
        cached_tokens: int = 0,
        logprobs: Sequence[TokenLogprobs] = (),
    ) -> list[HomeAction]:
        """Output tokens from ``index`` on. Duplicates are dropped; beyond a gap they wait."""
        request = self.requests.get(request_id)
        if request is None or not self._owns(request, peer, epoch):
            return [SendCancel(peer, request_id, epoch)]
        request.confirmed = True
        output = request.output
        known = len(output)
        if index != known:
            if index > known:
                request.early[index] = (tokens, finish_reason, message, cached_tokens, logprobs)
                return self._ask(request, peer)
            end = index + len(tokens)
            if end < known or (end == known and not finish_reason):
                return []
            tokens = tokens[known - index :]
            logprobs = logprobs[known - index :]
        elif not tokens and not finish_reason:
            return []  # the answer to an ask where nothing was missing
        output.extend(tokens)
        deliver = Deliver(
            request_id, known, tokens, finish_reason, message, cached_tokens, logprobs
        )
        if finish_reason:
            self._forget(request)
        elif request.early:
            return [deliver, *self._take_early(request, peer)]
        return [deliver]

    def claim(
        self,
        peer: Peer,
        request_id: str,
        epoch: int,
        attempt: str,
        index: int,
        tokens: Sequence[int],
        logprobs: Sequence[TokenLogprobs] = (),
    ) -> list[HomeAction]:
        """A party of a migration asks for the request, with the output not acknowledged."""
        request = self.requests.get(request_id)
        if request is None:
            return [SendClaimReply(peer, request_id, epoch, attempt, ClaimOutcome.GONE)]
        again = self._was_granted(request, peer, epoch, attempt)
        if not again and not self._may_claim(request, peer, epoch):
            return [SendClaimReply(peer, request_id, epoch, attempt, ClaimOutcome.SUPERSEDED)]
        actions: list[HomeAction] = []
        if not again:
            known = len(request.output)
            if index <= known < index + len(tokens):
                new = tokens[known - index :]
                request.output.extend(new)
                actions.append(Deliver(request_id, known, new, logprobs=logprobs[known - index :]))
            request.epoch = epoch + 1
            request.moves += 1
            self._hand_to(request, peer, attempt)
            self._mark_sent(request, peer)
            request.confirmed = True
        actions.append(
            SendClaimReply(
                peer,
                request_id,
                epoch,
                attempt,
                ClaimOutcome.GRANTED,
                request.epoch,
                len(request.output),
            )
        )
        return actions

    def holdings(self, peer: Peer, submits: int, held: Iterable[Held]) -> list[HomeAction]:
        """Everything that an instance holds for this gateway.

        What is stale is cancelled, what is ahead is asked for. What is missing is replayed
        if the instance had it for certain; otherwise its submit was lost and is sent again
        under the same epoch (the instance answers ``Lost`` if it had it after all).

        Args:
            submits: Submits that the instance had read from the present stream.
        """
        stream = self._streams.get(peer)
        if stream is None:
            return []
        # The first snapshot of a stream: what the old one carried may not have arrived, and
        # the instance does not know what did.
        fresh, stream.fresh = stream.fresh, False
        actions: list[HomeAction] = []
        seen: set[str] = set()
        for item in held:
            request_id = item.request_id
            request = self.requests.get(request_id)
            if request is None:
                actions.append(SendCancel(peer, request_id, item.epoch))
            elif self._owns(request, peer, item.epoch):
                seen.add(request_id)
                request.charged_prompt = max(request.charged_prompt, item.charged_prompt)
                if fresh or item.next_index > len(request.output):
                    request.asked = -1
                    actions.extend(self._ask(request, peer))
            elif item.state == SequenceStatus.HANDOVER and item.epoch == request.epoch:
                continue  # a destination whose claim is on its way
            elif (
                item.state == SequenceStatus.HANDOVER
                and item.epoch == request.epoch - 1
                and request.holder == peer
                and request.attempt
            ):
                seen.add(request_id)  # a claimant that has not read its grant: it asks again
            else:
                actions.append(SendCancel(peer, request_id, item.epoch))
        for request in list(self._held.get(peer, {}).values()):
            covered = request.stream != stream.number or request.submit_number <= submits
            if request.request_id in seen:
                request.confirmed = True
            elif covered and request.confirmed:
                actions.append(self._replay(request))
            elif covered:
                actions.extend(self._submit(request, peer))
        return actions

    def lost(self, peer: Peer, request_id: str, epoch: int) -> list[HomeAction]:
        """An instance was submitted or asked for what it does not hold any more."""
        request = self.requests.get(request_id)
        if request is None or not self._owns(request, peer, epoch):
            return []
        return [self._replay(request)]

    # ---- streams and deaths

    def connected(self, peer: Peer) -> None:
        """A stream to this incarnation is up; its first message will be its holdings."""
        self._streams[peer] = _Stream(self._next_stream)
        self._next_stream += 1

    def gone(self, peer: Peer) -> list[HomeAction]:
        """The incarnation is dead, replaced or out of reach for too long: replay what it held."""
        self._streams.pop(peer, None)
        held = list(self._held.get(peer, {}).values())
        return [self._replay(request, peer) for request in held]

    # ----

    def _owns(self, request: OwnedRequest, peer: Peer, epoch: int) -> bool:
        return request.epoch == epoch and request.holder == peer

    def _was_granted(self, request: OwnedRequest, peer: Peer, epoch: int, attempt: str) -> bool:
        return self._owns(request, peer, epoch + 1) and request.attempt == attempt

    def _may_claim(self, request: OwnedRequest, peer: Peer, epoch: int) -> bool:
        """A request that awaits a placement has left the epoch of every claim behind."""
        return request.epoch == epoch and request.holder is not None and peer in self._streams

    def _ask(self, request: OwnedRequest, peer: Peer) -> list[HomeAction]:
        """Ask once for each gap; a lost answer shows in the holdings."""
        index = len(request.output)
        if request.asked == index:
            return []
        request.asked = index
        return [SendAsk(peer, request.request_id, request.epoch, index)]

    def _take_early(self, request: OwnedRequest, peer: Peer) -> list[HomeAction]:
        """Tokens that waited for a gap to be filled."""
        actions: list[HomeAction] = []
        early, request_id = request.early, request.request_id
        while early and (index := min(early)) <= len(request.output):
            actions += self.tokens(peer, request_id, request.epoch, index, *early.pop(index))
        return actions

    def _hand_to(self, request: OwnedRequest, peer: Peer, attempt: str) -> None:
        self._release(request)
        request.holder = peer
        request.attempt = attempt
        request.confirmed = False
        request.asked = -1
        self._held.setdefault(peer, {})[request.request_id] = request

    def _release(self, request: OwnedRequest) -> None:
        if request.holder is not None:
            held = self._held[request.holder]
            del held[request.request_id]
            if not held:
                del self._held[request.holder]
            request.holder = None
            request.early.clear()

    def _submit(self, request: OwnedRequest, peer: Peer) -> list[HomeAction]:
        stream = self._streams.get(peer)
        if stream is None:
            return []  # the first holdings of the stream to come will show that it is missing
        stream.submits += 1
        self._mark_sent(request, peer)
        return [SendSubmit(peer, request.request_id, request.epoch)]

    def _mark_sent(self, request: OwnedRequest, peer: Peer) -> None:
        stream = self._streams.get(peer)
        request.stream = -1 if stream is None else stream.number
        request.submit_number = 0 if stream is None else stream.submits

    def _replay(self, request: OwnedRequest, failed: Peer | None = None) -> HomeAction:
        if failed is not None and failed.instance_id not in request.avoid:
            request.avoid = (*request.avoid, failed.instance_id)
        self._release(request)
        request.epoch += 1
        request.attempt = ""
        request.replays += 1
        return Place(request.request_id, request.epoch, request.avoid)

    def _forget(self, request: OwnedRequest) -> None:
        self._release(request)
        del self.requests[request.request_id]
