"""The migration state machines, message by message."""

from __future__ import annotations

import pytest

from instance.config import MigrationConfig
from instance.migration.protocol import (
    MOVED,
    Accept,
    Activate,
    Announce,
    Cancelled,
    CancelMigration,
    Claim,
    ClaimOutcome,
    ClaimReply,
    CopyBlocks,
    CopyDone,
    CopyEnded,
    CopyProgress,
    CopyStarted,
    DestinationMigration,
    DestinationState,
    Detach,
    Detached,
    DetachFailed,
    DropSequence,
    Ended,
    EpochRegistry,
    ExpectHandover,
    Extend,
    Extended,
    FreeReservation,
    FreeSequence,
    Handover,
    HomeConnected,
    HomeGone,
    Offer,
    PeerLost,
    Preempted,
    Refuse,
    RejectCopy,
    Released,
    Reserve,
    ReserveResult,
    Resume,
    SequenceEnded,
    SourceEvent,
    SourceMigration,
    SourceState,
    StartCompute,
    SubmitDecision,
    Tick,
    ToHome,
    ToPeer,
)

CONFIG = MigrationConfig(tail_blocks=2, max_stages=3, reply_timeout=5, lease=10, grace=20)
OUTPUT = (7, 8, 9)


def source(sealed: int = 10, total: int = 11, has_kv: bool = True) -> SourceMigration:
    machine = SourceMigration("a", "r", 4, "g", CONFIG)
    wanted = total + CONFIG.tail_blocks if has_kv else 0
    assert machine.start(sealed, total, has_kv, 0.0) == [ToPeer(Offer("a", "r", 4, "g", wanted))]
    return machine


def copying() -> SourceMigration:
    machine = source()
    machine.handle(Accept("a", 0), 0.0)
    return machine


def detaching() -> SourceMigration:
    machine = copying()
    machine.handle(CopyDone(0, True, 10, 11), 1.0)
    return machine


def handed_over() -> SourceMigration:
    machine = detaching()
    machine.handle(Detached(11, 170, OUTPUT, 1), 2.0)
    return machine


def claiming() -> SourceMigration:
    machine = handed_over()
    machine.handle(PeerLost(), 3.0)
    return machine


CLAIM = ToHome(Claim("r", 4, "a", 1, (8, 9)))


def reply(outcome: ClaimOutcome) -> ClaimReply:
    return ClaimReply("r", 4, "a", outcome, 5, 3)


class TestSource:
    def test_copies_in_stages_then_hands_over(self) -> None:
        machine = source()
        assert machine.handle(Accept("a", 3), 0.1) == [CopyBlocks(0, 3, 7)]
        assert machine.handle(CopyDone(0, True, 11, 12), 1.0) == [
            ToPeer(Announce("a", 13)),
            Detach(),
        ]
        detached = Detached(12, 180, OUTPUT, 1)
        handover = Handover("a", "r", 4, 12, 180, 2, OUTPUT, 1)
        assert machine.handle(detached, 2.0) == [CopyBlocks(1, 10, 2), ToPeer(handover)]
        assert machine.silent
        assert machine.handle(CopyDone(1, True, 11, 12), 2.1) == []
        assert machine.handle(Released("a"), 2.2) == [FreeSequence(), Ended(MOVED)]
        assert machine.ended
        assert (machine.stages, machine.blocks_sent, machine.detached_at) == (2, 9, 2.0)

    def test_a_request_without_kv_moves_without_a_copy(self) -> None:
        machine = source(has_kv=False)
        assert machine.handle(Accept("a", 0), 0.1) == [Detach()]
        handover = Handover("a", "r", 4, 0, 0, 0, (), 0)
        assert machine.handle(Detached(0, 0, (), 0), 0.2) == [ToPeer(handover)]

    def test_a_request_admitted_meanwhile_stays(self) -> None:
        machine = source(has_kv=False)
        machine.handle(Accept("a", 0), 0.1)
        actions = machine.handle(Detached(9, 140, (), 0), 0.2)
        assert actions[1:] == [Resume(4), Ended("admitted meanwhile")]

    def test_stages_end_when_what_is_left_stops_shrinking(self) -> None:
        machine = source(1, 20)
        machine.handle(Accept("a", 0), 0.0)
        assert machine.handle(CopyDone(0, True, 5, 21), 1.0)[-1] == Detach()

    def test_stages_end_at_their_limit(self) -> None:
        machine = source(40, 100)
        machine.handle(Accept("a", 0), 0.0)
        assert machine.handle(CopyDone(0, True, 60, 100), 1.0) == [CopyBlocks(1, 40, 20)]
        assert machine.handle(CopyDone(1, True, 80, 100), 2.0) == [CopyBlocks(2, 60, 20)]
        assert machine.handle(CopyDone(2, True, 90, 100), 3.0)[-1] == Detach()

    def test_asks_for_blocks_before_it_copies_more(self) -> None:
        machine = source(10, 20)
        machine.handle(Accept("a", 0), 0.0)
        assert machine.handle(CopyDone(0, True, 24, 25), 1.0)[0] == ToPeer(Extend("a", 28))
        assert machine.handle(Extended("a", 20), 1.1) == []
        assert machine.handle(Extended("a", 28), 1.2) == [CopyBlocks(1, 10, 14)]

    def test_asks_for_blocks_when_it_has_grown_while_detaching(self) -> None:
        machine = detaching()
        assert machine.handle(Detached(15, 230, OUTPUT, 1), 2.0) == [ToPeer(Extend("a", 15))]
        assert not machine.silent
        actions = machine.handle(Extended("a", 15), 2.5)
        assert actions[0] == CopyBlocks(1, 10, 5)
        assert isinstance(actions[1], ToPeer)
        assert machine.silent
        assert machine.detached_at == 2.0

    def test_a_refused_extension_puts_the_sequence_back(self) -> None:
        machine = detaching()
        machine.handle(Detached(15, 230, OUTPUT, 1), 2.0)
        assert machine.handle(Refuse("a", "full"), 2.5) == [Resume(4), Ended("refused: full")]

    @pytest.mark.parametrize(
        ("event", "told"),
        [
            (Refuse("a", "full"), False),
            (CancelMigration("a", "lease expired"), False),
            (PeerLost(), False),
            (Preempted(), True),
            (SequenceEnded(), True),
            (CopyDone(0, False), True),
            (HomeGone(), True),
        ],
    )
    def test_trouble_before_the_handover_ends_the_attempt(
        self, event: SourceEvent, told: bool
    ) -> None:
        machine = copying()
        actions = machine.handle(event, 1.0)
        assert len(actions) == 1 + told
        assert isinstance(actions[-1], Ended)
        assert machine.deadline() is None
        assert machine.handle(Accept("a", 0), 1.1) == []

    def test_no_answer_ends_the_attempt(self) -> None:
        machine = source()
        assert machine.deadline() == 5.0
        assert machine.handle(Tick(), 4.9) == []
        assert machine.handle(Tick(), 5.0)[-1] == Ended("no answer from the destination")

    def test_given_up_while_detaching_it_resumes_at_the_boundary(self) -> None:
        machine = detaching()
        assert machine.handle(PeerLost(), 1.5) == []
        assert machine.state is SourceState.STOPPING
        ended = Ended("link to the destination lost")
        assert machine.handle(Detached(11, 170, OUTPUT, 1), 2.0) == [Resume(4), ended]

    def test_a_sequence_that_ends_at_the_boundary_is_not_handed_over(self) -> None:
        assert detaching().handle(DetachFailed(), 2.0)[-1] == Ended("sequence ended")
        machine = detaching()
        machine.handle(SequenceEnded(), 1.5)
        assert machine.handle(DetachFailed(), 2.0) == [Ended("sequence ended")]

    @pytest.mark.parametrize(
        "event",
        [PeerLost(), CancelMigration("a", "lease expired"), Refuse("a", ""), CopyDone(1, False)],
    )
    def test_doubt_after_the_handover_is_for_the_home(self, event: SourceEvent) -> None:
        machine = handed_over()
        actions = machine.handle(event, 3.0)
        assert isinstance(actions[0], ToPeer)
        assert actions[1:] == [CLAIM]
        assert machine.handle(event, 3.1) == []

    def test_no_timer_resumes_or_frees_after_the_handover(self) -> None:
        machine = handed_over()
        now = 2.0
        for _ in range(50):
            due = machine.deadline()
            assert due is not None
            assert machine.handle(Tick(), due - 0.01) == []
            now = due
            assert machine.handle(Tick(), now)[-1] == CLAIM
        assert machine.silent

    def test_the_claim_is_repeated_on_a_new_stream(self) -> None:
        assert claiming().handle(HomeConnected(), 3.1) == [CLAIM]
        assert handed_over().handle(HomeConnected(), 3.1) == []

    def test_a_granted_claim_resumes_at_the_new_epoch(self) -> None:
        machine = claiming()
        assert machine.handle(reply(ClaimOutcome.GRANTED), 4.0) == [
            Resume(5, 3),
            Ended("taken back"),
        ]
        assert not machine.silent

    @pytest.mark.parametrize("outcome", [ClaimOutcome.SUPERSEDED, ClaimOutcome.GONE])
    def test_a_lost_claim_frees(self, outcome: ClaimOutcome) -> None:
        assert claiming().handle(reply(outcome), 4.0)[0] == FreeSequence()

    def test_replies_to_other_claims_mean_nothing(self) -> None:
        assert handed_over().handle(reply(ClaimOutcome.SUPERSEDED), 3.0) == []
        for other in (
            ClaimReply("r", 3, "a", ClaimOutcome.GONE),
            ClaimReply("r", 4, "b", ClaimOutcome.GONE),
        ):
            assert claiming().handle(other, 4.0) == []

    def test_a_dead_home_frees(self) -> None:
        assert handed_over().handle(HomeGone(), 9.0) == [FreeSequence(), Ended("home gone")]

    def test_a_cancel_frees_at_any_stage(self) -> None:
        for make in (source, copying, detaching, handed_over, claiming):
            assert make().handle(Cancelled(3), 5.0) == []
            actions = make().handle(Cancelled(4), 5.0)
            assert actions[-2:] == [FreeSequence(), Ended("cancelled by the home")]


OFFER = Offer("a", "r", 4, "g", 6)
HANDOVER = Handover("a", "r", 4, 5, 70, 2, OUTPUT, 1)


def reserved() -> DestinationMigration:
    machine = DestinationMigration(OFFER, CONFIG)
    assert machine.start() == [Reserve(6)]
    assert machine.handle(ReserveResult(True, 2), 0.0) == [ToPeer(Accept("a", 2))]
    return machine


def received() -> DestinationMigration:
    machine = reserved()
    for stage in (0, 1):
        machine.handle(CopyStarted(stage), 1.0)
        machine.handle(CopyEnded(stage, True), 2.0)
    return machine


def destination_claiming() -> DestinationMigration:
    machine = received()
    assert machine.handle(HANDOVER, 3.0) == [CLAIM, StartCompute(HANDOVER)]
    return machine


class TestDestination:
    def test_takes_a_sequence_over(self) -> None:
        machine = received()
        assert machine.handle(Announce("a", 6), 2.5) == [ExpectHandover()]
        assert machine.handle(HANDOVER, 3.0) == [CLAIM, StartCompute(HANDOVER)]
        assert machine.silent
        assert machine.handle(reply(ClaimOutcome.GRANTED), 3.1) == [
            Activate(5, 3),
            ToPeer(Released("a")),
            Ended(MOVED),
        ]
        assert not machine.silent
        assert machine.forget_at == 3.1 + CONFIG.lease + CONFIG.grace

    def test_says_released_again_to_a_doubled_handover(self) -> None:
        machine = destination_claiming()
        assert machine.handle(HANDOVER, 3.05) == []
        machine.handle(reply(ClaimOutcome.GRANTED), 3.1)
        assert machine.handle(HANDOVER, 3.2) == [ToPeer(Released("a"))]

    def test_refuses_with_the_reason(self) -> None:
        machine = DestinationMigration(OFFER, CONFIG)
        machine.start()
        actions = machine.handle(ReserveResult(False, reason="full"), 0.0)
        assert actions == [ToPeer(Refuse("a", "full")), Ended("refused: full")]

    def test_waits_for_every_stage(self) -> None:
        machine = reserved()
        machine.handle(CopyStarted(0), 1.0)
        machine.handle(CopyEnded(0, True), 1.5)
        assert machine.handle(HANDOVER, 2.0) == []
        machine.handle(CopyStarted(1), 2.1)
        assert machine.handle(CopyEnded(1, True), 2.2) == [CLAIM, StartCompute(HANDOVER)]

    def test_reserves_more(self) -> None:
        machine = reserved()
        assert machine.handle(Extend("a", 9), 1.0) == [Reserve(9)]
        assert machine.handle(Extend("a", 9), 1.1) == []
        assert machine.handle(ReserveResult(True), 1.2) == [ToPeer(Extended("a", 9))]
        machine.handle(Extend("a", 12), 1.3)
        actions = machine.handle(ReserveResult(False, reason="full"), 1.4)
        assert actions == [
            ToPeer(Refuse("a", "full")),
            FreeReservation(),
            Ended("refused: full"),
        ]

    def test_every_message_renews_the_lease(self) -> None:
        machine = reserved()
        now = 0.0
        for event in (CopyStarted(0), CopyProgress(), CopyEnded(0, True), Announce("a", 6)):
            now += CONFIG.lease - 1
            assert FreeReservation() not in machine.handle(event, now)
            assert machine.deadline() == now + CONFIG.lease
        actions = machine.handle(Tick(), now + CONFIG.lease)
        assert actions == [
            ToPeer(CancelMigration("a", "lease expired")),
            FreeReservation(),
            Ended("lease expired"),
        ]

    def test_a_handover_after_the_lease_is_not_taken(self) -> None:
        # No tick came in between, as in a process that was stopped.
        actions = received().handle(HANDOVER, 2.0 + CONFIG.lease)
        assert FreeReservation() in actions
        assert not any(isinstance(action, ToHome | StartCompute) for action in actions)
        assert actions[-1] == ToPeer(CancelMigration("a", "lease expired"))

    def test_a_handover_that_does_not_fit_is_not_taken(self) -> None:
        for handover in (
            Handover("a", "r", 4, 7, 100, 2, OUTPUT, 1),
            Handover("a", "r", 5, 5, 70, 2, OUTPUT, 1),
        ):
            assert received().handle(handover, 3.0)[1] == FreeReservation()

    def test_blocks_are_kept_while_a_copy_may_land(self) -> None:
        machine = reserved()
        machine.handle(CopyStarted(0), 1.0)
        assert machine.handle(CancelMigration("a", "preempted"), 1.1) == []
        assert machine.state is DestinationState.STOPPING
        assert machine.handle(CopyStarted(1), 1.2) == [RejectCopy(1)]
        ended = Ended("source gave up: preempted")
        assert machine.handle(CopyEnded(0, True), 1.3) == [FreeReservation(), ended]

    def test_a_reservation_that_comes_too_late_is_freed(self) -> None:
        machine = DestinationMigration(OFFER, CONFIG)
        machine.start()
        assert machine.handle(CopyStarted(0), 0.0) == [RejectCopy(0)]
        assert machine.handle(PeerLost(), 0.1) == []
        assert machine.handle(ReserveResult(True), 0.2)[0] == FreeReservation()

    def test_a_failed_copy_ends_the_attempt(self) -> None:
        machine = reserved()
        machine.handle(CopyStarted(0), 1.0)
        assert machine.handle(CopyEnded(0, False), 1.1)[1] == FreeReservation()

    def test_trouble_before_the_claim_ends_the_attempt(self) -> None:
        for event in (PeerLost(), HomeGone(), Cancelled(4), CancelMigration("a", "")):
            assert FreeReservation() in received().handle(event, 2.5)
        assert received().handle(Cancelled(3), 2.5) == []

    def test_a_broken_link_does_not_end_what_was_handed_over(self) -> None:
        machine = reserved()
        for stage in (0, 1):
            machine.handle(CopyStarted(stage), 1.0)
        machine.handle(CopyEnded(0, True), 1.5)
        machine.handle(HANDOVER, 2.0)
        assert machine.handle(PeerLost(), 2.1) == []
        assert machine.handle(CopyEnded(1, True), 2.2) == [CLAIM, StartCompute(HANDOVER)]

    def test_no_timer_ends_a_claim(self) -> None:
        machine = destination_claiming()
        for _ in range(50):
            due = machine.deadline()
            assert due is not None
            assert machine.handle(Tick(), due - 0.01) == []
            assert machine.handle(Tick(), due) == [CLAIM]
        assert machine.handle(CancelMigration("a", "the source claims"), 90.0) == []
        assert machine.handle(HomeConnected(), 90.0) == [CLAIM]

    def test_a_lost_claim_drops_the_sequence(self) -> None:
        for event in (
            reply(ClaimOutcome.SUPERSEDED),
            reply(ClaimOutcome.GONE),
            HomeGone(),
            Cancelled(4),
        ):
            machine = destination_claiming()
            actions = machine.handle(event, 4.0)
            assert DropSequence() in actions
            assert FreeReservation() not in actions
            assert machine.handle(reply(ClaimOutcome.GRANTED), 4.1) == []
        assert destination_claiming().handle(CopyStarted(2), 4.0) == [RejectCopy(2)]


class TestEpochRegistry:
    def test_only_a_newer_epoch_starts(self) -> None:
        registry = EpochRegistry(10.0)
        decide = registry.decide
        assert decide("r", 1, None, True, 0.0) is SubmitDecision.START
        assert decide("r", 1, 1, True, 0.1) is SubmitDecision.IGNORE
        assert decide("r", 2, 1, True, 0.2) is SubmitDecision.START
        assert decide("r", 1, 2, True, 0.3) is SubmitDecision.LOST
        assert decide("r", 2, None, True, 0.4) is SubmitDecision.LOST
        assert decide("r", 3, None, False, 0.5) is SubmitDecision.LOST

    def test_a_cancel_that_overtakes_its_submit(self) -> None:
        registry = EpochRegistry(10.0)
        registry.note("r", 1, 0.0)
        assert registry.decide("r", 1, None, True, 0.1) is SubmitDecision.LOST

    def test_old_offers_are_known(self) -> None:
        registry = EpochRegistry(10.0)
        registry.note("r", 3, 0.0)
        assert registry.accepts_offer("r", 3)
        assert not registry.accepts_offer("r", 2)

    def test_tombstones_end(self) -> None:
        registry = EpochRegistry(10.0)
        registry.note("old", 1, 0.0)
        registry.note("kept", 5, 1.0)
        registry.note("kept", 2, 8.0)
        registry.expire(10.0)
        assert len(registry) == 1
        assert registry.highest("old") == 0
        assert registry.highest("kept") == 5
