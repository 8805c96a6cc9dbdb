"""Rebalancing, draining and migration on demand in the dispatcher's core."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.dispatcher.core import Dispatcher
from cluster.dispatcher.events import (
    DrainRequested,
    Finished,
    Joined,
    MigrationEnded,
    MigrationRequested,
    PlaceRequested,
    RejectMigration,
    Reported,
    ResumeRequested,
    SetDraining,
    StartMigration,
    Tick,
)
from cluster.dispatcher.load import InstanceLoad
from cluster.dispatcher.rebalance import RebalanceConfig, gain
from cluster.dispatcher.views import InstanceState, LoadView
from instance.load import MigrationReport
from instance.request import RequestClass
from tests.unit.dispatching import World, ask, dispatcher, info, placed, report, sequence


def ready(loads: dict[str, tuple], now: float = 1.0, **config) -> Dispatcher:
    core = dispatcher(**config)
    for name, sequences in loads.items():
        core.handle(Joined(info(name)), now)
        core.handle(Reported(report(name, 1, sequences)), now)
    return core


def moves(actions) -> list[tuple[str, str, str]]:
    return [
        (a.request_id, a.source, a.destination.instance_id)
        for a in actions
        if isinstance(a, StartMigration)
    ]


def many(prefix: str, count: int, blocks: int = 50, **more) -> tuple:
    return tuple(sequence(f"{prefix}{n}", blocks, **more) for n in range(count))


# ---- balance


def test_the_least_free_gives_to_the_freest() -> None:
    core = ready({"full": many("a", 8), "half": many("b", 4), "empty": ()})
    (move,) = moves(core.handle(Tick(), 1.1))
    assert move[1:] == ("full", "empty")


def test_rebalancing_can_be_switched_off() -> None:
    core = ready({"full": many("a", 8), "empty": ()}, rebalance=RebalanceConfig(enabled=False))
    assert core.handle(Tick(), 1.1) == []


@pytest.mark.parametrize(
    "loads",
    [
        {"i0": many("a", 3), "i1": many("b", 3)},
        {"i0": many("a", 4), "i1": many("b", 3)},
        {"i0": many("a", 1), "i1": ()},
        {"i0": (), "i1": ()},
    ],
)
def test_no_move_that_would_only_swap_the_load(loads) -> None:
    assert ready(loads).handle(Tick(), 1.1) == []


def test_lowest_class_goes_first_then_the_shorter() -> None:
    found = (
        sequence("urgent", 10, request_class=RequestClass.INTERACTIVE),
        *many("a", 4),
        sequence("long", 80, request_class=RequestClass.BATCH),
        sequence("short", 40, request_class=RequestClass.BATCH),
    )
    ((request_id, _, _),) = moves(ready({"i0": found, "i1": ()}).handle(Tick(), 1.1))
    assert request_id == "short"


def test_the_first_waiting_request_goes_before_running_ones() -> None:
    waiting = (sequence("w0", 60, running=False), sequence("w1", 5, running=False))
    core = ready({"i0": (*many("a", 19), *waiting), "i1": many("b", 2)})
    ((request_id, _, _),) = moves(core.handle(Tick(), 1.1))
    assert request_id == "w0"


def test_requests_that_migrate_or_have_ended_stay() -> None:
    found = (*many("a", 5, migrating=True), sequence("ended", 50))
    core = ready({"i0": found, "i1": ()})
    core.handle(Finished("ended", 1), 1.0)
    assert core.handle(Tick(), 1.1) == []


def test_no_move_to_a_full_batch_or_pool() -> None:
    core = ready({"i0": many("a", 8)})
    core.handle(Joined(info("i1", slots=0)), 1.0)
    core.handle(Reported(report("i1", 1)), 1.0)
    assert core.handle(Tick(), 1.1) == []
    core = ready({"i0": many("a", 8)})
    core.handle(Joined(info("i1", blocks=50)), 1.0)
    core.handle(Reported(report("i1", 1, blocks=50)), 1.0)
    assert core.handle(Tick(), 1.1) == []


def test_suspect_instances_neither_give_nor_take() -> None:
    core = ready({"i0": many("a", 8), "i1": ()})
    core.handle(Reported(report("i0", 2, many("a", 8))), 4.0)
    assert core.members.state("i1", 4.0) is InstanceState.SUSPECT
    assert core.handle(Tick(), 4.0) == []


def test_after_a_move_both_must_report_before_the_next() -> None:
    core = ready({"i0": many("a", 8), "i1": ()}, rebalance=RebalanceConfig(pair_cooldown=0.0))
    ((request_id, source, destination),) = moves(core.handle(Tick(), 1.1))
    core.handle(
        MigrationEnded(MigrationReport(request_id, "1", source, destination, "balance", "moved")),
        1.2,
    )
    assert core.handle(Tick(), 2.2) == []
    left = tuple(s for s in many("a", 8) if s.request_id != request_id)
    core.handle(Reported(report("i0", 2, left)), 2.3)
    assert core.handle(Tick(), 3.3) == []
    core.handle(Reported(report("i1", 2, (sequence(request_id, 50, epoch=2),))), 3.4)
    core.handle(Reported(report("i0", 3, left)), 3.4)
    assert len(moves(core.handle(Tick(), 4.4))) == 1


loads = st.lists(st.lists(st.integers(1, 120), max_size=12), min_size=2, max_size=5)


def settle(sizes: list[list[int]], **config) -> World:
    world = World(dispatcher(**config))
    for index, blocks in enumerate(sizes):
        name = f"i{index}"
        world.join(name)
        world.held[name] = {
            f"r{index}.{n}": sequence(f"r{index}.{n}", size) for n, size in enumerate(blocks)
        }
    return world


def reported_view(world: World, name: str) -> LoadView:
    """The load as the last report has it, before any move was planned on it."""
    known = world.core.members.loads[name]
    load = InstanceLoad(known.info, known.heard)
    assert known.report is not None
    load.accept(known.report, known.heard)
    return load.view(world.now, world.core.config.load)


@settings(deadline=None)
@given(loads)
def test_every_move_gains_and_the_cluster_comes_to_rest(sizes) -> None:
    config = RebalanceConfig(request_cooldown=0.0, pair_cooldown=0.0)
    world = settle(sizes, rebalance=config)
    for _ in range(200):
        world.run(0.5)
        if any(move.reason != "balance" for move in world.under_way):
            continue  # a move for balance after another of its round was judged by other loads
        for move in world.under_way:
            source = world.held[move.source]
            position = None
            views = {name: reported_view(world, name) for name in world.held}
            listed = world.core.members.loads[move.source].find(move.request_id)
            assert listed is not None
            assert move.request_id in source
            if not listed.running:
                position = 0
            rise = gain(
                views[move.source],
                views[move.destination.instance_id],
                listed,
                position,
                world.core.migrations.links,
                config,
            )
            assert rise > config.min_gain
    count = len(world.moves)
    world.run(20)
    assert len(world.moves) == count


@settings(deadline=None)
@given(loads, st.sampled_from(["moved", "refused: no room"]))
def test_cooldown_bounds_the_moves_of_a_request(sizes, outcome) -> None:
    world = settle(sizes, rebalance=RebalanceConfig(request_cooldown=10.0))
    world.run(30, outcome)
    counts = Counter(move.request_id for move in world.moves)
    assert all(count <= 1 + 30 / 10 for count in counts.values())


def test_few_migrations_are_under_way_at_a_time() -> None:
    full = {f"f{n}": many(f"f{n}.", 10) for n in range(8)}
    empty = {f"e{n}": () for n in range(8)}
    core = ready({**full, **empty}, rebalance=RebalanceConfig(max_in_flight=3))
    assert len(moves(core.handle(Tick(), 1.1))) == 3
    assert core.handle(Tick(), 2.2) == []


def test_a_migration_that_nobody_ends_is_forgotten() -> None:
    core = ready({"i0": many("a", 8), "i1": ()}, migration_timeout=60.0)
    assert moves(core.handle(Tick(), 1.1))
    assert len(core.members.transfers) == 1
    core.handle(Tick(), 62.0)
    assert core.members.transfers == {}


# ---- drain


@settings(deadline=None)
@given(loads, st.integers(0, 4))
def test_drain_empties_the_instance_where_there_is_room(sizes, which) -> None:
    world = settle(sizes)
    drained = f"i{which % len(sizes)}"
    world.core.handle(Tick(), world.now)
    world.take(world.core.handle(DrainRequested(drained), world.now))
    world.run(60)
    others = [name for name in world.held if name != drained]
    total = sum(len(held) for held in world.held.values())
    assert total == sum(len(blocks) for blocks in sizes)
    room = [1000 - sum(s.blocks for s in world.held[name].values()) for name in others]
    for left in world.held[drained].values():
        assert all(free <= left.blocks for free in room)
    count = len(world.moves)
    world.place(ask("new"))
    assert "new" not in world.held[drained]
    world.run(5)
    if not world.held[drained]:
        assert all(move.reason == "balance" for move in world.moves[count:])


def test_a_failed_drain_move_is_tried_again_without_a_storm() -> None:
    world = settle([[10] * 3, []])
    world.take(world.core.handle(DrainRequested("i0"), 0.0))
    world.run(10, "refused: busy")
    assert 3 <= len(world.moves) <= 3 * 11
    world.run(10)
    assert world.held["i0"] == {}


def test_drain_and_resume_tell_the_instance() -> None:
    core = ready({"i0": (), "i1": ()})
    assert core.handle(DrainRequested("i0"), 1.0) == [SetDraining("i0", True)]
    assert core.members.state("i0", 1.0) is InstanceState.DRAINING
    assert placed(core.handle(PlaceRequested(ask("r")), 1.0)) == ["i1"]
    core.handle(Reported(report("i0", 2, draining=True)), 1.1)
    assert core.handle(ResumeRequested("i0"), 1.2) == [SetDraining("i0", False)]
    assert core.members.state("i0", 1.2) is InstanceState.READY
    assert core.handle(DrainRequested("nobody"), 1.3) == []


@given(st.lists(st.booleans(), max_size=4), st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_a_late_report_does_not_undo_an_order(orders: list[bool], delays: list[int]) -> None:
    """Reports written before the instance heard of an order, and reordered, change nothing."""
    core = ready({"i0": many("a", 4), "i1": ()})
    now, written, numbers = 1.0, [True], iter(range(2, 100))
    for drain in (True, False, *orders):
        core.handle(DrainRequested("i0") if drain else ResumeRequested("i0"), now)
        written.append(drain)
        late = [(next(numbers), written[max(0, len(written) - 1 - delay)]) for delay in delays]
        for number, says in sorted(late, key=lambda item: -item[0] % 3):
            now += 0.01
            core.handle(Reported(report("i0", number, many("a", 4), draining=says)), now)
            wanted = InstanceState.DRAINING if drain else InstanceState.READY
            assert core.members.state("i0", now) is wanted


def test_resumed_requests_stay_though_a_late_report_says_draining() -> None:
    core = ready({"i0": many("a", 4), "i1": many("b", 5)})
    core.handle(DrainRequested("i0"), 1.0)
    core.handle(ResumeRequested("i0"), 1.1)
    core.handle(Reported(report("i0", 2, many("a", 4), draining=True)), 1.2)
    assert moves(core.handle(Tick(), 1.3)) == []
    assert placed(core.handle(PlaceRequested(ask("r")), 1.3)) == ["i0"]


def test_draining_survives_restarts_of_dispatcher_and_instance() -> None:
    core = ready({"i0": ()})
    core.handle(Reported(report("i0", 2, draining=True)), 1.0)
    assert core.members.state("i0", 1.0) is InstanceState.DRAINING
    core.handle(DrainRequested("i0"), 1.0)
    assert core.handle(Joined(info("i0", "b")), 1.1) == [SetDraining("i0", True)]
    assert core.members.state("i0", 1.1) is InstanceState.DRAINING


# ---- on demand


def rejected(actions) -> str:
    (action,) = actions
    assert isinstance(action, RejectMigration)
    return action.code


def test_a_request_moves_where_the_operator_says() -> None:
    core = ready({"i0": many("a", 1), "i1": many("b", 5), "i2": ()})
    assert moves(core.handle(MigrationRequested("a0", "i1"), 1.0)) == [("a0", "i0", "i1")]
    assert rejected(core.handle(MigrationRequested("a0", "i2"), 1.0)) == "conflict"
    assert core.counters["migrations_started"] == {"admin": 1}


def test_without_a_destination_the_freest_other_instance_is_taken() -> None:
    core = ready({"i0": many("a", 1), "i1": many("b", 5), "i2": many("c", 2)})
    assert moves(core.handle(MigrationRequested("a0"), 1.0)) == [("a0", "i0", "i2")]


def test_a_request_just_placed_can_be_moved() -> None:
    core = ready({"i0": (), "i1": many("b", 5)})
    assert placed(core.handle(PlaceRequested(ask("r")), 1.0)) == ["i0"]
    assert moves(core.handle(MigrationRequested("r"), 1.0)) == [("r", "i0", "i1")]


def test_errors_of_a_requested_migration() -> None:
    core = ready({"i0": many("a", 1), "i1": ()})
    assert rejected(core.handle(MigrationRequested("nobody"), 1.0)) == "unknown_request"
    assert rejected(core.handle(MigrationRequested("a0", "i9"), 1.0)) == "unknown_instance"
    assert rejected(core.handle(MigrationRequested("a0", "i0"), 1.0)) == "conflict"
    core.handle(DrainRequested("i1"), 1.0)
    assert rejected(core.handle(MigrationRequested("a0", "i1"), 1.0)) == "conflict"
    assert rejected(core.handle(MigrationRequested("a0"), 1.0)) == "conflict"
    core.handle(Finished("a0", 1), 1.0)
    assert rejected(core.handle(MigrationRequested("a0"), 1.0)) == "unknown_request"


@pytest.mark.parametrize(("outcome", "at"), [("moved", "i1"), ("refused: no room", "i0")])
def test_load_follows_a_migration_before_the_next_reports(outcome, at) -> None:
    core = ready({"i0": many("a", 2), "i1": ()})
    core.handle(MigrationRequested("a0", "i1"), 1.0)
    during = {view.info.instance_id: view.free_blocks for view in core.view(1.0).instances}
    assert during == {"i0": 950, "i1": 950}
    ended = MigrationReport("a0", "1", "i0", "i1", "admin", outcome)
    core.handle(MigrationEnded(ended), 1.1)
    found = core.locate("a0", 1.1)
    assert found is not None
    assert found[0].info.instance_id == at
    assert core.counters["migrations_ended"] == {f"admin/{outcome.partition(':')[0]}": 1}


def test_a_restarted_instance_ends_its_migrations() -> None:
    core = ready({"i0": many("a", 2), "i1": ()})
    core.handle(MigrationRequested("a0", "i1"), 1.0)
    core.handle(Joined(info("i1", "b")), 1.1)
    assert core.members.transfers == {}
