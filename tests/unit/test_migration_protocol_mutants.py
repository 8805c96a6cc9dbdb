"""The random exploration must notice each of these broken protocols."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from cluster.gateway.home import Home, OwnedRequest
from cluster.gateway.home_actions import Held, HomeAction, Peer, SendSubmit
from instance.migration import messages as m
from instance.migration.destination import DestinationMigration, DestinationState
from instance.migration.source import SourceMigration, SourceState
from tests.unit.migration_explorer import PAIRS, Explorer
from tests.unit.migration_kv import Violation
from tests.unit.migration_model import Instance
from tests.unit.migration_world import Parts

RUNS = 860


class TakesAnyEpoch(Home):
    """The home takes tokens of every epoch and party."""

    def _owns(self, request: OwnedRequest, peer: Peer, epoch: int) -> bool:
        return True


class GrantsOldClaims(Home):
    """The home grants claims without comparing the epoch."""

    def _may_claim(self, request: OwnedRequest, peer: Peer, epoch: int) -> bool:
        return request.holder is not None


class GrantsTwice(Home):
    """The home repeats a grant to whoever takes part in the attempt."""

    def _was_granted(self, request: OwnedRequest, peer: Peer, epoch: int, attempt: str) -> bool:
        return request.epoch == epoch + 1 and request.attempt == attempt


class ReplaysAtTheSameEpoch(Home):
    """The home starts a request elsewhere without a new epoch."""

    def _replay(self, request: OwnedRequest, failed: Peer | None = None) -> HomeAction:
        action = super()._replay(request, failed)
        request.epoch -= 1
        return action


class NeverAsks(Home):
    """The home does not ask for tokens that it lacks."""

    def _ask(self, request: OwnedRequest, peer: Peer) -> list[HomeAction]:
        return []


class TrustsSubmits(Home):
    """The home does not look for submits that were lost."""

    def holdings(self, peer: Peer, submits: int, held: Iterable[Held]) -> list[HomeAction]:
        return [
            action
            for action in super().holdings(peer, submits, held)
            if not isinstance(action, SendSubmit)
        ]


class FreesAtHandover(SourceMigration):
    """The source frees its blocks when it has sent the handover."""

    def _hand_over(self, detached: m.Detached, now: float) -> list[m.SourceAction]:
        actions = super()._hand_over(detached, now)
        if self.state is SourceState.HANDED_OVER:
            actions.append(m.FreeSequence())
        return actions


class ResumesByTimer(SourceMigration):
    """The source resumes under its old epoch when nobody confirms the handover."""

    def _after_handover(self, event: m.SourceEvent, now: float) -> list[m.SourceAction]:
        due = self.deadline()
        if isinstance(event, m.Tick) and due is not None and now >= due:
            return [m.Resume(self.epoch), *self._end("timeout")]
        return super()._after_handover(event, now)


class ResumesOnRefusal(SourceMigration):
    """The source takes the destination's word that it did not take the handover."""

    def _after_handover(self, event: m.SourceEvent, now: float) -> list[m.SourceAction]:
        if isinstance(event, m.CancelMigration | m.PeerLost):
            return [m.Resume(self.epoch), *self._end("refused")]
        return super()._after_handover(event, now)


class SourceClaimsWithoutTokens(SourceMigration):
    """The source's claim carries no tokens."""

    def _claim(self, now: float) -> list[m.SourceAction]:
        return [_stripped(action) for action in super()._claim(now)]


class IgnoresPreemption(SourceMigration):
    """The source goes on copying blocks that it has lost."""

    def handle(self, event: m.SourceEvent, now: float) -> list[m.SourceAction]:
        return [] if isinstance(event, m.Preempted) else super().handle(event, now)


class WaitsForADeadHome(SourceMigration):
    """The source claims for ever."""

    def handle(self, event: m.SourceEvent, now: float) -> list[m.SourceAction]:
        if isinstance(event, m.HomeGone | m.Cancelled) and self.silent:
            return []
        return super().handle(event, now)


class DestinationClaimsWithoutTokens(DestinationMigration):
    """The destination's claim carries no tokens."""

    def _claim(self, now: float) -> m.DestinationAction:
        return _stripped(super()._claim(now))


class IgnoresItsLease(DestinationMigration):
    """The destination takes a handover after its lease has expired."""

    def handle(self, event: m.DestinationEvent, now: float) -> list[m.DestinationAction]:
        if isinstance(event, m.Handover) and self.outcome == "lease expired" and self.ended:
            self.state = DestinationState.RESERVED
            self._reserved, self._deadline = self._wanted, None
        return super().handle(event, now)


class LeaseWithoutEnd(DestinationMigration):
    """The destination keeps a reservation until it is told to free it."""

    def _renew(self, now: float) -> None:
        self._deadline = None


class FreesUnderACopy(DestinationMigration):
    """The destination frees its blocks while a copy may still land in them."""

    def _settle(self, now: float) -> list[m.DestinationAction]:
        self._landing.clear()
        return super()._settle(now)


class ClaimsBeforeTheTail(DestinationMigration):
    """The destination does not wait for the last copy stages."""

    def _claim_when_complete(self, now: float) -> list[m.DestinationAction]:
        if self._handover is not None:
            self._written.update(range(self._handover.num_stages))
        return super()._claim_when_complete(now)


class ActivatesUngranted(DestinationMigration):
    """The destination takes the handover for ownership."""

    def _claim_when_complete(self, now: float) -> list[m.DestinationAction]:
        actions = super()._claim_when_complete(now)
        if self.state is DestinationState.CLAIMING and self._handover is not None:
            actions += [m.Activate(self.epoch + 1, len(self._handover.output))]
            actions += self._end("moved", now)
        return actions


class DropsByTimer(DestinationMigration):
    """The destination frees a claimed sequence when the home does not answer."""

    def _while_claiming(self, event: m.DestinationEvent, now: float) -> list[m.DestinationAction]:
        actions = super()._while_claiming(event, now)
        if isinstance(event, m.Tick) and self.state is DestinationState.CLAIMING:
            return [m.ToPeer(m.Released(self.attempt)), *self._stop("timeout", now, tell=False)]
        return actions


class DoesNotPin(Instance):
    """Blocks being sent are reused when their sequence goes."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.pool.pin = lambda blocks: None
        self.pool.unpin = lambda blocks: None


class RemembersNoEpochs(Instance):
    """A submit that comes twice runs twice."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.registry.note = lambda *args: None


def _stripped(action: Any) -> Any:
    if isinstance(action, m.ToHome):
        claim = action.claim
        return m.ToHome(m.Claim(claim.request_id, claim.epoch, claim.attempt, claim.index, ()))
    return action


MUTANTS = [
    Parts(home=TakesAnyEpoch),
    Parts(home=GrantsOldClaims),
    Parts(home=GrantsTwice),
    Parts(home=ReplaysAtTheSameEpoch),
    Parts(home=NeverAsks),
    Parts(home=TrustsSubmits),
    Parts(source=FreesAtHandover),
    Parts(source=ResumesByTimer),
    Parts(source=ResumesOnRefusal),
    Parts(source=SourceClaimsWithoutTokens),
    Parts(source=IgnoresPreemption),
    Parts(source=WaitsForADeadHome),
    Parts(destination=DestinationClaimsWithoutTokens),
    Parts(destination=IgnoresItsLease),
    Parts(destination=LeaseWithoutEnd),
    Parts(destination=FreesUnderACopy),
    Parts(destination=ClaimsBeforeTheTail),
    Parts(destination=ActivatesUngranted),
    Parts(destination=DropsByTimer),
    Parts(instance=DoesNotPin),
    Parts(instance=RemembersNoEpochs),
]


def name_of(parts: Parts) -> str:
    whole = Parts()
    return next(
        getattr(parts, part).__name__
        for part in ("source", "destination", "home", "instance")
        if getattr(parts, part) is not getattr(whole, part)
    )


def runs_until_caught(parts: Parts) -> tuple[int, str]:
    """How many runs it took, and what was noticed."""
    for number in range(RUNS):
        target = PAIRS[(number * 37) % len(PAIRS)]
        try:
            Explorer(f"mutant{number}", parts, target).run()
        except Violation as violation:
            return number + 1, str(violation)
    return RUNS, ""


@pytest.mark.parametrize("parts", MUTANTS, ids=name_of)
def test_a_broken_protocol_is_noticed(parts: Parts) -> None:
    runs, violation = runs_until_caught(parts)
    assert violation, f"nothing was noticed in {runs} runs"
