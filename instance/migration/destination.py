"""The destination's side of one migration attempt."""

from __future__ import annotations

import enum

from instance.config import MigrationConfig
from instance.migration.messages import (
    Accept,
    Activate,
    Announce,
    Cancelled,
    CancelMigration,
    Claim,
    ClaimOutcome,
    ClaimReply,
    CopyEnded,
    CopyProgress,
    CopyStarted,
    DestinationAction,
    DestinationEvent,
    DropSequence,
    Ended,
    ExpectHandover,
    Extend,
    Extended,
    FreeReservation,
    Handover,
    HomeConnected,
    HomeGone,
    Offer,
    PeerLost,
    Refuse,
    RejectCopy,
    Released,
    Reserve,
    ReserveResult,
    StartCompute,
    Tick,
    ToHome,
    ToPeer,
)
from instance.migration.source import MOVED


class DestinationState(enum.StrEnum):
    """Where the attempt stands.

    NEW: not started.
    RESERVING: waits for the blocks.
    RESERVED: holds blocks and takes copies, under a lease.
    EXTENDING: the same, and waits for more blocks.
    HANDED_OVER: has the handover, waits for the copies that belong to it, under the lease.
    CLAIMING: has everything, asks the home for the request; no timer ends this.
    STOPPING: given up; writes may still land in its blocks.
    ENDED: over.
    """

    NEW = "new"
    RESERVING = "reserving"
    RESERVED = "reserved"
    EXTENDING = "extending"
    HANDED_OVER = "handed_over"
    CLAIMING = "claiming"
    STOPPING = "stopping"
    ENDED = "ended"


_LEASED = (DestinationState.RESERVED, DestinationState.EXTENDING, DestinationState.HANDED_OVER)
_STARTED = (*_LEASED, DestinationState.RESERVING)


class DestinationMigration:
    """Takes one sequence over from another instance.

    The reservation is a lease that each message of the attempt renews. After the claim was
    sent only the home's answer, or its death, ends the attempt. Blocks
    are freed only when no write of the source can land any more.

    An ended attempt is kept by the shell until ``forget_at``, so that late and doubled
    messages meet their answer here and start nothing.

    Args:
        offer: The source's offer.
        config: Limits.

    Attributes:
        state: Where the attempt stands.
        outcome: "moved" or why not; "" until it is known.
        forget_at: Time from which an ended attempt need not be remembered; None before.
    """

    def __init__(self, offer: Offer, config: MigrationConfig) -> None:
        self.offer = offer
        self.attempt = offer.attempt
        self.request_id = offer.request_id
        self.epoch = offer.epoch
        self.home = offer.home
        self.state = DestinationState.NEW
        self.outcome = ""
        self.forget_at: float | None = None
        self._config = config
        self._deadline: float | None = None
        self._wanted = offer.num_blocks
        self._reserving = False
        self._reserved: int | None = None
        self._landing: set[int] = set()
        self._written: set[int] = set()
        self._handover: Handover | None = None
        self._computing = False

    @property
    def silent(self) -> bool:
        """The sequence started here may compute, but neither emits nor charges."""
        return self.state is DestinationState.CLAIMING

    @property
    def live(self) -> bool:
        """The request is on its way to this instance, under the offer's epoch."""
        return self.state in _STARTED or self.state is DestinationState.CLAIMING

    @property
    def ended(self) -> bool:
        return self.state is DestinationState.ENDED

    def deadline(self) -> float | None:
        """When ``Tick`` is due; None while only events can move the attempt."""
        return self._deadline

    def start(self) -> list[DestinationAction]:
        """Ask for the blocks that the offer names."""
        self.state = DestinationState.RESERVING
        self._reserving = True
        return [Reserve(self._wanted)]

    def handle(self, event: DestinationEvent, now: float) -> list[DestinationAction]:
        """Take in one event; events that are late, doubled or out of place do nothing."""
        actions: list[DestinationAction] = []
        if self.state in _LEASED and self._deadline is not None and now >= self._deadline:
            # Also where the process was stopped meanwhile and no timer ran.
            actions = self._stop("lease expired", now)
        if self.state in _STARTED:
            return [*actions, *self._before_claim(event, now)]
        if self.state is DestinationState.CLAIMING:
            return [*actions, *self._while_claiming(event, now)]
        return [*actions, *self._after_end(event, now)]

    # ---- before the claim: trouble or silence ends the attempt

    def _before_claim(self, event: DestinationEvent, now: float) -> list[DestinationAction]:
        match event:
            case ReserveResult():
                return self._reserve_result(event, now)
            case Extend():
                self._renew(now)
                if self.state is not DestinationState.RESERVED or event.num_blocks <= self._wanted:
                    return []
                self.state = DestinationState.EXTENDING
                self._wanted = event.num_blocks
                self._reserving = True
                return [Reserve(self._wanted)]
            case Announce():
                self._renew(now)
                return [ExpectHandover()] if self.state is DestinationState.RESERVED else []
            case CopyStarted():
                if self._reserved is None:
                    return [RejectCopy(event.stage)]
                self._renew(now)
                self._landing.add(event.stage)
            case CopyProgress():
                self._renew(now)
            case CopyEnded():
                return self._copy_ended(event, now)
            case Handover():
                return self._take_handover(event, now)
            case CancelMigration():
                return self._stop(f"source gave up: {event.reason}", now, tell=False)
            case PeerLost() if self.state is not DestinationState.HANDED_OVER:
                return self._stop("link to the source lost", now, tell=False)
            case HomeGone():
                return self._stop("home gone", now)
            case Cancelled() if event.epoch >= self.epoch:
                return self._stop("cancelled by the home", now)
        return []

    def _reserve_result(self, event: ReserveResult, now: float) -> list[DestinationAction]:
        if not self._reserving:
            return []
        self._reserving = False
        if not event.ok:
            refusal = ToPeer(Refuse(self.attempt, event.reason))
            return [refusal, *self._stop(f"refused: {event.reason}", now, tell=False)]
        first = self._reserved is None
        self._reserved = self._wanted
        self.state = DestinationState.RESERVED
        self._renew(now)
        if first:
            return [ToPeer(Accept(self.attempt, event.cached_blocks))]
        return [ToPeer(Extended(self.attempt, self._wanted))]

    def _copy_ended(self, event: CopyEnded, now: float) -> list[DestinationAction]:
        if event.stage not in self._landing:
            return []
        self._landing.remove(event.stage)
        if not event.ok:
            return self._stop("copy failed", now)
        self._written.add(event.stage)
        self._renew(now)
        return self._claim_when_complete(now)

    def _take_handover(self, event: Handover, now: float) -> list[DestinationAction]:
        if self.state is DestinationState.HANDED_OVER:
            return []
        fits = self._reserved is not None and event.num_blocks <= self._reserved
        if self.state is not DestinationState.RESERVED or not fits or event.epoch != self.epoch:
            return self._stop("handover does not fit the reservation", now)
        self.state = DestinationState.HANDED_OVER
        self._handover = event
        self._renew(now)
        return self._claim_when_complete(now)

    def _claim_when_complete(self, now: float) -> list[DestinationAction]:
        handover = self._handover
        if handover is None or any(k not in self._written for k in range(handover.num_stages)):
            return []
        self.state = DestinationState.CLAIMING
        self._computing = True
        return [self._claim(now), StartCompute(handover)]

    # ---- after the claim: only the home's word, or its death, ends the attempt

    def _while_claiming(self, event: DestinationEvent, now: float) -> list[DestinationAction]:
        match event:
            case ClaimReply() if event.attempt == self.attempt and event.epoch == self.epoch:
                if event.outcome is ClaimOutcome.GRANTED:
                    activate = Activate(event.new_epoch, event.next_index)
                    released = ToPeer(Released(self.attempt))
                    return [activate, released, *self._end(MOVED, now)]
                return self._stop(event.outcome.name.lower(), now)
            case HomeGone():
                return self._stop("home gone", now)
            case Cancelled() if event.epoch >= self.epoch:
                return self._stop("cancelled by the home", now)
            case HomeConnected():
                return [self._claim(now)]
            case Tick() if self._deadline is not None and now >= self._deadline:
                return [self._claim(now)]
            case CopyStarted():
                return [RejectCopy(event.stage)]
        return []

    def _claim(self, now: float) -> DestinationAction:
        handover = self._handover
        assert handover is not None
        self._deadline = now + self._config.claim_interval
        acked = handover.acked
        return ToHome(
            Claim(
                self.request_id,
                self.epoch,
                self.attempt,
                acked,
                handover.output[acked:],
                handover.logprobs,
            )
        )

    # ---- the end

    def _after_end(self, event: DestinationEvent, now: float) -> list[DestinationAction]:
        match event:
            case CopyStarted():
                return [RejectCopy(event.stage)]
            case CopyEnded():
                self._landing.discard(event.stage)
                return self._settle(now)
            case ReserveResult() if self._reserving:
                self._reserving = False
                if event.ok:
                    self._reserved = self._wanted
                return self._settle(now)
            case Handover() if self.outcome == MOVED:
                return [ToPeer(Released(self.attempt))]
            case Handover():
                # The source learns at once that it may claim the request back.
                return [self._cancel_message()]
        return []

    def _stop(self, reason: str, now: float, tell: bool = True) -> list[DestinationAction]:
        self.state, self._deadline = DestinationState.STOPPING, None
        self.outcome = reason
        actions: list[DestinationAction] = [self._cancel_message()] if tell else []
        if self._computing:
            actions.append(DropSequence())
            self._computing, self._reserved = False, None
        return [*actions, *self._settle(now)]

    def _settle(self, now: float) -> list[DestinationAction]:
        """Free the blocks once nothing can be written to them, and end."""
        if self.state is not DestinationState.STOPPING or self._landing or self._reserving:
            return []
        actions: list[DestinationAction] = []
        if self._reserved is not None:
            self._reserved = None
            actions.append(FreeReservation())
        return [*actions, *self._end(self.outcome, now)]

    def _end(self, outcome: str, now: float) -> list[DestinationAction]:
        self.state, self._deadline = DestinationState.ENDED, None
        self.outcome = outcome
        self.forget_at = now + self._config.lease + self._config.grace
        return [Ended(outcome)]

    def _renew(self, now: float) -> None:
        if self.state in _LEASED:
            self._deadline = now + self._config.lease

    def _cancel_message(self) -> DestinationAction:
        return ToPeer(CancelMigration(self.attempt, self.outcome))
