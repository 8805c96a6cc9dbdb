"""The source's side of one migration attempt."""

from __future__ import annotations

import enum
import math

from instance.config import MigrationConfig
from instance.migration.messages import (
    Accept,
    Announce,
    Cancelled,
    CancelMigration,
    Claim,
    ClaimOutcome,
    ClaimReply,
    CopyBlocks,
    CopyDone,
    Detach,
    Detached,
    DetachFailed,
    Ended,
    Extend,
    Extended,
    FreeSequence,
    Handover,
    HomeConnected,
    HomeGone,
    Offer,
    PeerLost,
    Preempted,
    Refuse,
    Released,
    Resume,
    SequenceEnded,
    SourceAction,
    SourceEvent,
    Tick,
    ToHome,
    ToPeer,
)

MOVED = "moved"
CANCELLED = "cancelled by the home"


class SourceState(enum.StrEnum):
    """Where the attempt stands. Up to ``DETACHED`` the source owns the request.

    NEW: not started.
    OFFERED: waits for the destination's answer.
    COPYING: a stage is on its way while decoding goes on.
    EXTENDING: waits for more blocks while decoding goes on.
    DETACHING: waits for the step boundary.
    DETACHED: out of the batch, waits for more blocks before the handover.
    HANDED_OVER: the handover was sent; only the home knows who owns the request.
    CLAIMING: asks the home for the request itself.
    STOPPING: given up while detaching; goes on as soon as the boundary is reached.
    ENDED: over.
    """

    NEW = "new"
    OFFERED = "offered"
    COPYING = "copying"
    EXTENDING = "extending"
    DETACHING = "detaching"
    DETACHED = "detached"
    HANDED_OVER = "handed_over"
    CLAIMING = "claiming"
    STOPPING = "stopping"
    ENDED = "ended"


class SourceMigration:
    """Moves one sequence to another instance (staged copy after Llumnix, section 4.2).

    Until the handover is sent any trouble ends the attempt and the sequence goes on under
    its epoch. From then on no timer frees or resumes: the source waits for ``Released``,
    and in doubt claims the request from the home until answered.

    The shell feeds every event to ``handle`` and executes the actions in order; it calls
    ``handle(Tick(), now)`` at ``deadline()``. Times are monotonic seconds.

    Args:
        attempt: Unique id of this attempt in the cluster.
        request_id: The request to move.
        epoch: The epoch under which the source holds it.
        home: Its home.
        config: Limits.

    Attributes:
        state: Where the attempt stands.
        stages: Copy stages started, the tail included.
        blocks_sent: Blocks copied or being copied.
        outcome: "moved" or why not; "" until the end.
        detached_at: Time at which the sequence left the batch; None before.
    """

    def __init__(
        self, attempt: str, request_id: str, epoch: int, home: str, config: MigrationConfig
    ) -> None:
        self.attempt = attempt
        self.request_id = request_id
        self.epoch = epoch
        self.home = home
        self.state = SourceState.NEW
        self.stages = 0
        self.blocks_sent = 0
        self.outcome = ""
        self.detached_at: float | None = None
        self._config = config
        self._deadline: float | None = None
        self._has_kv = True
        self._reserved = 0
        self._sent = 0
        self._sealed = 0
        self._total = 0
        self._left = math.inf
        self._announcing = False
        self._detached: Detached | None = None

    @property
    def silent(self) -> bool:
        """The sequence must neither run nor emit: its ownership is in the home's hands."""
        return self.state in (SourceState.HANDED_OVER, SourceState.CLAIMING)

    @property
    def ended(self) -> bool:
        return self.state is SourceState.ENDED

    def deadline(self) -> float | None:
        """When ``Tick`` is due; None while only events can move the attempt."""
        return self._deadline

    def start(
        self, sealed_blocks: int, total_blocks: int, has_kv: bool, now: float
    ) -> list[SourceAction]:
        """Offer the request.

        Args:
            sealed_blocks: Leading blocks that will not change any more.
            total_blocks: Blocks in the block table.
            has_kv: False for a request that waits without KV; it moves without a copy.
        """
        self._has_kv = has_kv
        self._sealed = sealed_blocks if has_kv else 0
        self._total = total_blocks if has_kv else 0
        # Room for what grows during the first stage saves a round trip later.
        self._reserved = self._total + self._config.tail_blocks if has_kv else 0
        self._wait(SourceState.OFFERED, self._config.reply_timeout, now)
        offer = Offer(self.attempt, self.request_id, self.epoch, self.home, self._reserved)
        return [ToPeer(offer)]

    def handle(self, event: SourceEvent, now: float) -> list[SourceAction]:
        """Take in one event; events that are late, doubled or out of place do nothing."""
        if self.state in (SourceState.NEW, SourceState.ENDED):
            return []
        if isinstance(event, Cancelled):
            if event.epoch < self.epoch:
                return []
            actions: list[SourceAction] = []
            if not self.silent and self.state is not SourceState.STOPPING:
                actions.append(self._cancel_message(CANCELLED))
            return [*actions, FreeSequence(), *self._end(CANCELLED)]
        if self.silent:
            return self._after_handover(event, now)
        if self.state is SourceState.STOPPING:
            return self._while_stopping(event)
        return self._before_handover(event, now)

    # ---- before the handover: any trouble ends the attempt

    def _before_handover(self, event: SourceEvent, now: float) -> list[SourceAction]:
        state = self.state
        match event:
            case Accept() if state is SourceState.OFFERED:
                self._sent = event.cached_blocks
                if not self._has_kv:
                    return self._detach()
                return self._next_stage(now)
            case CopyDone() if state is SourceState.COPYING and event.stage == self.stages - 1:
                if not event.ok:
                    return self._give_up("copy failed")
                self._sealed, self._total = event.sealed_blocks, event.total_blocks
                return self._next_stage(now)
            case Extended() if event.num_blocks >= self._reserved:
                return self._extended(event.num_blocks, now)
            case Detached() if state is SourceState.DETACHING:
                return self._hand_over(event, now)
            case DetachFailed() if state is SourceState.DETACHING:
                return [self._cancel_message("sequence ended"), *self._end("sequence ended")]
            case Refuse():
                return self._give_up(f"refused: {event.reason}", tell=False)
            case CancelMigration():
                return self._give_up(f"destination gave up: {event.reason}", tell=False)
            case PeerLost():
                return self._give_up("link to the destination lost", tell=False)
            case Preempted() if self._has_kv:
                return self._give_up("preempted")
            case SequenceEnded():
                return self._give_up("sequence ended")
            case HomeGone():
                return self._give_up("home gone")
            case Tick() if self._deadline is not None and now >= self._deadline:
                return self._give_up("no answer from the destination")
        return []

    def _next_stage(self, now: float) -> list[SourceAction]:
        left = self._total - self._sent
        go_on = (
            left > self._config.tail_blocks
            and self._sealed > self._sent
            and left < self._left
            and self.stages < self._config.max_stages
        )
        # One block more than now: the step before the boundary may open it.
        wanted = self._sealed if go_on else self._total + 1
        self._left = left
        self._announcing = not go_on
        if wanted > self._reserved:
            self._wait(SourceState.EXTENDING, self._config.reply_timeout, now)
            return [self._extend(self._total + self._config.tail_blocks + 1)]
        if go_on:
            self.state, self._deadline = SourceState.COPYING, None
            return [self._copy(self._sealed)]
        return self._announce()

    def _extend(self, num_blocks: int) -> SourceAction:
        self._reserved = num_blocks
        return ToPeer(Extend(self.attempt, num_blocks))

    def _extended(self, num_blocks: int, now: float) -> list[SourceAction]:
        if self.state is SourceState.DETACHED and self._detached is not None:
            return self._hand_over(self._detached, now)
        if self.state is not SourceState.EXTENDING:
            return []
        if self._announcing:
            return self._announce()
        self.state, self._deadline = SourceState.COPYING, None
        return [self._copy(self._sealed)]

    def _copy(self, end: int) -> SourceAction:
        """The next stage: blocks not sent yet, up to ``end``."""
        action = CopyBlocks(self.stages, self._sent, end - self._sent)
        self.stages += 1
        self.blocks_sent += action.count
        self._sent = end
        return action

    def _announce(self) -> list[SourceAction]:
        return [ToPeer(Announce(self.attempt, self._reserved)), *self._detach()]

    def _detach(self) -> list[SourceAction]:
        self.state, self._deadline = SourceState.DETACHING, None
        return [Detach()]

    def _hand_over(self, detached: Detached, now: float) -> list[SourceAction]:
        self._detached = detached
        if self.detached_at is None:
            self.detached_at = now
        total = detached.total_blocks
        if total > self._reserved:
            self._wait(SourceState.DETACHED, self._config.reply_timeout, now)
            if not self._has_kv:
                # It was admitted meanwhile: copying all of it now would be a long pause.
                return self._give_up("admitted meanwhile")
            return [self._extend(total)]
        actions: list[SourceAction] = []
        if total > self._sent:
            actions.append(self._copy(total))
        self._wait(SourceState.HANDED_OVER, self._config.reply_timeout, now)
        handover = Handover(
            attempt=self.attempt,
            request_id=self.request_id,
            epoch=self.epoch,
            num_blocks=total,
            num_computed=detached.num_computed,
            num_stages=self.stages,
            output=detached.output,
            acked=detached.acked,
            logprobs=detached.logprobs,
        )
        return [*actions, ToPeer(handover)]

    def _give_up(self, reason: str, tell: bool = True) -> list[SourceAction]:
        actions: list[SourceAction] = [self._cancel_message(reason)] if tell else []
        if self.state is SourceState.DETACHING:
            self.state, self._deadline = SourceState.STOPPING, None
            self.outcome = reason
            return actions
        if self.state is SourceState.DETACHED:
            actions.append(Resume(self.epoch))
        return [*actions, *self._end(reason)]

    def _while_stopping(self, event: SourceEvent) -> list[SourceAction]:
        if isinstance(event, Detached):
            return [Resume(self.epoch), *self._end(self.outcome)]
        if isinstance(event, DetachFailed):
            return self._end(self.outcome)
        return []

    # ---- after the handover: only the home's word, or its death, ends the attempt

    def _after_handover(self, event: SourceEvent, now: float) -> list[SourceAction]:
        claiming = self.state is SourceState.CLAIMING
        match event:
            case Released():
                return [FreeSequence(), *self._end(MOVED)]
            case ClaimReply() if claiming:
                if event.attempt != self.attempt or event.epoch != self.epoch:
                    return []
                if event.outcome is ClaimOutcome.GRANTED:
                    return [Resume(event.new_epoch, event.next_index), *self._end("taken back")]
                return [FreeSequence(), *self._end(event.outcome.name.lower())]
            case HomeGone():
                return [FreeSequence(), *self._end("home gone")]
            case HomeConnected() if claiming:
                return self._claim(now)
            case Tick() if self._deadline is not None and now >= self._deadline:
                return self._claim(now)
            case Refuse() | CancelMigration() | PeerLost() if not claiming:
                return self._claim(now)
            case CopyDone() if not event.ok and not claiming:
                return self._claim(now)
        return []

    def _claim(self, now: float) -> list[SourceAction]:
        actions: list[SourceAction] = []
        if self.state is not SourceState.CLAIMING:
            # A destination that has not claimed yet can free its blocks at once.
            actions.append(self._cancel_message("the source claims the request"))
        self._wait(SourceState.CLAIMING, self._config.claim_interval, now)
        assert self._detached is not None
        acked, output = self._detached.acked, self._detached.output
        claim = Claim(
            self.request_id,
            self.epoch,
            self.attempt,
            acked,
            output[acked:],
            self._detached.logprobs,
        )
        return [*actions, ToHome(claim)]

    # ----

    def _wait(self, state: SourceState, seconds: float, now: float) -> None:
        self.state = state
        self._deadline = now + seconds

    def _cancel_message(self, reason: str) -> SourceAction:
        return ToPeer(CancelMigration(self.attempt, reason))

    def _end(self, outcome: str) -> list[SourceAction]:
        self.state, self._deadline = SourceState.ENDED, None
        self.outcome = outcome
        return [Ended(outcome)]
