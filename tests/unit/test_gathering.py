"""Large requests that wait for memory do so at few instances, if that lets others run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.dispatcher.core import Dispatcher
from cluster.dispatcher.events import Joined, PlaceRequested, Reported, StartMigration, Tick
from cluster.dispatcher.gathering import plan_gathering
from cluster.dispatcher.queues import Held
from cluster.dispatcher.rebalance import RebalanceConfig
from instance.load import SequenceLoad
from instance.request import RequestClass
from tests.unit.dispatching import BLOCK_SIZE, ask, dispatcher, info, placed, report, sequence

NOW, WAITED = 50.0, 10.0
BLOCKS = 100


@dataclass
class Line:
    """What waits in the dispatcher, as a test has it."""

    held: Iterable[Held] = ()
    reservations: int | None = 1

    def in_front(self) -> Iterable[Held]:
        return self.held


@dataclass
class Received:
    """What tenants have received, as a test has it."""

    counters: dict[str, float]

    def counter(self, account) -> float:
        return self.counters.get(account[0], 0.0)


def waits(name: str, blocks: int, tenant: str = "default", **more) -> SequenceLoad:
    made = sequence(name, blocks, running=False, **more)._replace(tenant=tenant)
    return made._replace(uncomputed=made.num_tokens)


def small(blocks: int = 10, tenant: str = "default", waited: float = 2.0, **more) -> Held:
    request = ask("small", tokens=blocks * BLOCK_SIZE - 1, tenant=tenant, **more)
    return Held(request, NOW - waited, NOW)


def ready(loads: dict[str, tuple]) -> Dispatcher:
    core = dispatcher(rebalance=RebalanceConfig(hysteresis=1e9))
    for name, sequences in loads.items():
        core.handle(Joined(info(name, blocks=BLOCKS)), NOW)
        core.handle(Reported(report(name, 1, sequences, blocks=BLOCKS)), NOW)
    return core


def moves(loads: dict[str, tuple], line: Line, waited: dict[str, float] | None = None, **counters):
    core = ready(loads)
    migrations = core.migrations
    views = {view.instance_id: view for view in core.members.views(NOW)}
    migrations._waited = {
        s.request_id: NOW - (waited or {}).get(s.request_id, WAITED)
        for found in loads.values()
        for s in found
        if not s.running
    }
    plan = migrations._round(views, list(views), 16, NOW)
    plan_gathering(plan, line, Received(counters))
    assert {move.reason for move in plan.moves} <= {"defragment"}
    return [(m.sequence.request_id, m.source, m.destination) for m in plan.moves]


TWO = {
    "i0": (sequence("a", 40), waits("big0", 80)),
    "i1": (sequence("b", 50), waits("big1", 70)),
}


def test_all_but_the_one_that_has_waited_longest_wait_behind_it() -> None:
    assert moves(TWO, Line([small()])) == [("big1", "i1", "i0")]
    assert moves(TWO, Line([small()]), {"big1": 11.0}) == [("big0", "i0", "i1")]
    three = {**TWO, "i2": (sequence("c", 60), waits("big2", 60))}
    held = [small(), small(30)]
    assert [one for one, _, _ in moves(three, Line(held))] == ["big1"]  # takes both
    assert [one for one, _, _ in moves(three, Line([*held, small()]))] == ["big1", "big2"]
    assert moves(three, Line([small()], reservations=3)) == []


def test_every_instance_keeps_its_own_where_requests_are_sent_on_at_once() -> None:
    assert moves(TWO, Line([small()], reservations=None)) == []


def test_who_waits_with_it_is_worth_a_move_as_well() -> None:
    loads = {**TWO, "i1": (*TWO["i1"], waits("little", 10))}
    assert moves(loads, Line()) == [("big1", "i1", "i0")]


@pytest.mark.parametrize(
    "line",
    [
        Line(),
        Line([small(waited=0.1)]),  # as soon as that ends it will be placed anyway
        Line([small(49)]),  # a block for each that runs is missing
        Line([small(request_class=RequestClass.BATCH)]),
        Line([small(tenant="rich")]),
    ],
)
def test_nobody_leaves_for_nothing_or_for_one_that_it_goes_before(line: Line) -> None:
    assert moves(TWO, line, rich=1.0) == []


def test_one_that_goes_before_it_gets_the_room() -> None:
    assert moves(TWO, Line([small(tenant="poor")]), default=1.0) == [("big1", "i1", "i0")]
    urgent = small(request_class=RequestClass.INTERACTIVE)
    assert moves(TWO, Line([urgent])) == [("big1", "i1", "i0")]


def test_what_has_kv_on_the_host_stays() -> None:
    swapped = waits("big1", 70)._replace(uncomputed=1)
    assert moves({**TWO, "i1": (sequence("b", 50), swapped)}, Line([small()])) == []


def test_one_that_fits_nowhere_else_stays() -> None:
    loads = {"i0": (sequence("a", 40), waits("big0", 80)), "i1": (waits("huge", 100),)}
    assert moves(loads, Line([small()])) == []


def test_held_requests_run_where_a_large_one_has_gone() -> None:
    core = ready(TWO)
    assert core.handle(PlaceRequested(ask("small", tokens=150)), NOW) == []
    assert core.handle(Tick(), NOW + 0.1) == []  # it has just come
    start, place = core.handle(Tick(), NOW + 1.2)
    assert isinstance(start, StartMigration)
    assert (start.request_id, start.source, start.destination.instance_id) == ("big1", "i1", "i0")
    assert placed([place]) == ["i1"]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(1, 60), max_size=4),
            st.lists(st.tuples(st.integers(1, 99), st.sampled_from("ab")), max_size=4),
        ),
        min_size=2,
        max_size=6,
    ),
    st.lists(st.tuples(st.integers(1, 60), st.sampled_from("ab")), max_size=8),
    st.integers(1, 3),
    st.floats(0.0, 5.0),
)
def test_whoever_leaves_lets_others_run(loads, held, reservations, ahead) -> None:
    """Every move gives room to some who wait and who do not go after the one that leaves; as
    many instances as may keep their first one do; none that leaves is waited behind."""
    made, stuck = {}, set()
    for number, (running, waiting) in enumerate(loads):
        runs: list[SequenceLoad] = []
        for at, blocks in enumerate(running):
            if sum(one.blocks for one in runs) + blocks <= BLOCKS:
                runs.append(sequence(f"r{number}.{at}", blocks))
        wait = tuple(waits(f"w{number}.{at}", *one) for at, one in enumerate(waiting))
        made[f"i{number}"] = (*runs, *wait)
        if wait and wait[0].blocks > BLOCKS - sum(one.blocks for one in runs):
            stuck.add(f"i{number}")
    line = Line([small(blocks, tenant) for blocks, tenant in held], reservations)
    found = moves(made, line, a=ahead)
    assert len(found) <= max(0, len(stuck) - reservations)
    sources = {source for _, source, _ in found}
    assert len(sources) == len(found)
    assert sources <= stuck
    assert {destination for _, _, destination in found} <= stuck - sources
    for request_id, source, _ in found:
        head = next(one for one in made[source] if not one.running)
        assert head.request_id == request_id
        running = [one for one in made[source] if one.running]
        room = BLOCKS - sum(one.blocks for one in running) - len(running)
        may = [one.blocks for one in made[source] if not one.running and one is not head]
        may += [blocks for blocks, tenant in held if tenant == head.tenant or head.tenant == "a"]
        assert min(may, default=BLOCKS) < room
