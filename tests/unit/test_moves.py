"""Why requests move: each named reason, by itself and all together."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.dispatcher.core import Dispatcher
from cluster.dispatcher.duties import plan_drain, plan_handoff
from cluster.dispatcher.evening import plan_fairness
from cluster.dispatcher.events import (
    Joined,
    MigrationEnded,
    Reported,
    RoleRequested,
    SetRole,
    StartMigration,
    Tick,
)
from cluster.dispatcher.links import DEFAULT_RATE, LinkRates, block_bytes
from cluster.dispatcher.llumnix import remaining_steps
from cluster.dispatcher.load import LoadConfig
from cluster.dispatcher.rebalance import RebalanceConfig
from instance.load import InstanceInfo, MigrationReport, Role, SequenceLoad
from instance.request import RequestClass
from tests.unit.dispatching import MODEL, World, dispatcher, info, report, sequence

SLOTS = 64


def ready(loads: dict[str, tuple], now: float = 1.0, **config) -> Dispatcher:
    core = dispatcher(**config)
    for name in loads:
        core.handle(Joined(info(name, blocks=100)), now)
    again(core, loads, now, 1)
    return core


def again(core: Dispatcher, loads: dict[str, tuple], now: float, number: int) -> None:
    for name, sequences in loads.items():
        core.handle(Reported(report(name, number, sequences, blocks=100)), now)


def moves(actions) -> list[tuple[str, str, str, str]]:
    return [
        (a.reason, a.request_id, a.source, a.destination.instance_id)
        for a in actions
        if isinstance(a, StartMigration)
    ]


def later(core: Dispatcher, loads: dict[str, tuple], until: float) -> list:
    """Reports and ticks every half second; the moves started in that time."""
    found = []
    for number in range(2, round((until - 1.0) / 0.5) + 2):
        now = 1.0 + 0.5 * (number - 1)
        again(core, loads, now, number)
        found += moves(core.handle(Tick(), now))
    return found


def of(tenant: str, name: str, blocks: int, running: bool = True, **more) -> SequenceLoad:
    return sequence(name, blocks, running, **more)._replace(tenant=tenant)


# ---- defragment

OFF = RebalanceConfig(hysteresis=1e9)
"""Nothing moves for balance."""


def test_room_is_made_for_a_large_waiting_request() -> None:
    loads = {
        "i0": (sequence("a", 30), sequence("b", 45), sequence("big", 60, running=False)),
        "i1": (sequence("c", 60),),
        "i2": (sequence("d", 50),),
    }
    core = ready(loads, rebalance=OFF)
    assert moves(core.handle(Tick(), 1.0)) == []  # it has just come
    assert later(core, loads, 4.0) == [("defragment", "b", "i0", "i2")]


def test_several_make_room_where_one_does_not_suffice() -> None:
    loads = {
        "i0": (*(sequence(f"a{n}", 16) for n in range(5)), sequence("big", 50, running=False)),
        "i1": (sequence("c", 60),),
        "i2": (sequence("d", 60),),
    }
    core = ready(loads, rebalance=OFF)
    assert len(later(core, loads, 4.0)) == 2


def test_a_large_request_itself_moves_where_it_fits() -> None:
    loads = {
        "i0": (sequence("a", 50), sequence("big", 60, running=False)),
        "i1": (sequence("b", 20),),
    }
    core = ready(loads, rebalance=OFF)
    assert later(core, loads, 3.0)[0] == ("defragment", "big", "i0", "i1")


def test_room_is_not_made_where_it_would_not_suffice() -> None:
    loads = {
        "i0": (sequence("a", 90), sequence("big", 95, running=False)),
        "i1": (sequence("c", 60),),
    }
    core = ready(loads, rebalance=OFF)
    assert later(core, loads, 20.0) == []


def test_room_is_not_made_at_the_cost_of_a_higher_class() -> None:
    loads = {
        "i0": (
            sequence("urgent", 50, request_class=RequestClass.INTERACTIVE),
            sequence("big", 60, running=False),
        ),
        "i1": (sequence("c", 45),),
    }
    core = ready(loads, rebalance=OFF)
    assert later(core, loads, 20.0) == []


# ---- isolate


def test_others_make_way_for_interactive_requests() -> None:
    urgent = sequence("urgent", 30, request_class=RequestClass.INTERACTIVE)
    loads = {"i0": (urgent, sequence("a", 30), sequence("b", 35)), "i1": (sequence("c", 10),)}
    core = ready(loads, rebalance=OFF, load=LoadConfig(headroom_blocks=20))
    assert moves(core.handle(Tick(), 1.1)) == [("isolate", "a", "i0", "i1")]
    calm = {name: tuple(s for s in held if s is not urgent) for name, held in loads.items()}
    core = ready(calm, rebalance=OFF, load=LoadConfig(headroom_blocks=20))
    assert moves(core.handle(Tick(), 1.1)) == []


# ---- fairness


class Ahead:
    """Tenants' counters as a test sets them."""

    def __init__(self, theta: float = 10.0, **counters: float) -> None:
        self.counters = counters
        self._theta = theta

    def counter(self, account) -> float:
        return self.counters.get(account[0], 0.0)

    def theta(self, info: InstanceInfo) -> float:
        return self._theta


def fair_moves(loads: dict[str, tuple], order: Ahead, waited: float = 10.0) -> list:
    core = ready(loads, rebalance=OFF)
    migrations = core.migrations
    views = {view.instance_id: view for view in core.members.views(1.0)}
    migrations._waited = {
        s.request_id: 1.0 - waited for held in loads.values() for s in held if not s.running
    }
    plan = migrations._round(views, list(views), 16, 1.0)
    plan_fairness(plan, order)
    return [(m.sequence.request_id, m.source, m.destination) for m in plan.moves]


def test_the_tenant_furthest_behind_is_taken_where_it_has_nothing() -> None:
    loads = {
        "i0": (
            of("poor", "p0", 90),
            of("poor", "p1", 40, running=False),
            of("rich", "r0", 40, False),
        ),
        "i1": (of("rich", "r1", 90),),
    }
    assert fair_moves(loads, Ahead(rich=100.0)) == [("p1", "i0", "i1")]
    assert fair_moves(loads, Ahead(rich=100.0), waited=0.0) == []


def test_no_move_for_fairness_without_a_right_to_preempt_or_room() -> None:
    loads = {
        "i0": (of("poor", "p0", 90), of("poor", "p1", 40, running=False)),
        "i1": (of("rich", "r1", 90),),
    }
    assert fair_moves(loads, Ahead(rich=5.0, theta=10.0)) == []
    loads["i1"] = (of("rich", "r1", 20),)
    assert fair_moves(loads, Ahead(rich=5.0, theta=10.0)) == [("p1", "i0", "i1")]


def test_one_that_waits_there_already_is_not_sent_after_it() -> None:
    loads = {
        "i0": (of("poor", "p0", 90), of("poor", "p1", 40, running=False)),
        "i1": (of("rich", "r1", 90), of("poor", "p2", 40, running=False)),
    }
    assert fair_moves(loads, Ahead(rich=100.0)) == []


def queue_of(tenant: str, number: int) -> tuple[SequenceLoad, ...]:
    return tuple(of(tenant, f"{tenant}{n}", 10, running=False) for n in range(number))


def test_the_tenant_behind_passes_those_that_wait_elsewhere() -> None:
    loads = {
        "i0": (of("poor", "p", 90), *queue_of("poor", 3)),
        "i1": (of("poor", "q", 90), *queue_of("rich", 3)),
    }
    assert fair_moves(loads, Ahead(rich=100.0)) == [("poor0", "i0", "i1")]
    # Not for a difference that the instances are allowed to have.
    assert fair_moves(loads, Ahead(rich=5.0, theta=10.0)) == []
    # What waits there in vain can as well wait where it is.
    loads["i0"] = (of("poor", "p", 90), *queue_of("poor", 1))
    assert fair_moves(loads, Ahead(rich=100.0)) == []


def test_as_many_leave_an_instance_as_may_at_a_time() -> None:
    loads = {"i0": (of("poor", "p", 90), *queue_of("poor", 9))}
    for number in range(1, 8):
        loads[f"i{number}"] = (of("rich", f"r{number}", 90),)
    found = fair_moves(loads, Ahead(rich=100.0))
    assert len({destination for _, _, destination in found}) == len(found)
    assert len(found) == RebalanceConfig().max_light_per_instance


def test_a_class_is_not_compared_with_another() -> None:
    urgent = of("rich", "r", 90, request_class=RequestClass.INTERACTIVE)
    loads = {"i0": (of("poor", "p", 90), *queue_of("poor", 3)), "i1": (urgent,)}
    assert fair_moves(loads, Ahead(rich=100.0)) == []


# ---- roles and handoff


def test_requests_go_on_elsewhere_after_their_prompt() -> None:
    computing = sequence("new", 10)._replace(uncomputed=50)
    done = sequence("done", 10)._replace(uncomputed=1)
    core = ready({"p": (computing, done), "d": (), "m": ()}, rebalance=RebalanceConfig(False))
    assert core.handle(RoleRequested("p", Role.PREFILL), 1.0) == [SetRole("p", Role.PREFILL)]
    core.handle(RoleRequested("d", Role.DECODE), 1.0)
    ((reason, request_id, source, target),) = moves(core.handle(Tick(), 1.1))
    assert (reason, request_id, source) == ("handoff", "done", "p")
    assert target in ("d", "m")
    core.handle(RoleRequested("p", Role.MIXED), 1.2)
    core.handle(MigrationEnded(MigrationReport("done", "1", "p", target, reason, "refused")), 1.2)
    assert moves(core.handle(Tick(), 9.0)) == []


def test_without_room_elsewhere_a_request_is_decoded_where_it_is() -> None:
    done = sequence("done", 10)._replace(uncomputed=1)
    core = ready({"p": (done,), "d": (sequence("x", 99),)})
    core.handle(RoleRequested("p", Role.PREFILL), 1.0)
    core.handle(RoleRequested("d", Role.DECODE), 1.0)
    assert moves(core.handle(Tick(), 1.1)) == []


def test_roles_at_start_yield_to_what_instances_report() -> None:
    core = dispatcher(roles=(("i0", Role.PREFILL), ("i1", Role.PREFILL)))
    for name in ("i0", "i1", "i2"):
        core.handle(Joined(info(name)), 0.0)
    assert core.handle(Reported(report("i0", 1)), 0.0) == [SetRole("i0", Role.PREFILL)]
    told = dataclasses.replace(report("i1", 1), role=Role.DECODE)
    assert core.handle(Reported(told), 0.0) == []
    core.handle(Reported(report("i2", 1)), 0.0)
    roles = {view.instance_id: view.role for view in core.members.views(0.0)}
    assert roles == {"i0": Role.PREFILL, "i1": Role.DECODE, "i2": Role.MIXED}


# ---- limits


def test_few_migrations_at_a_time_per_instance() -> None:
    held = tuple(sequence(f"a{n}", 10) for n in range(8))
    core = ready({"i0": held, "i1": (), "i2": ()}, rebalance=RebalanceConfig(max_per_instance=2))
    views = {view.instance_id: view for view in core.members.views(1.0)}
    plan = core.migrations._round(views, list(views), 16, 1.0)
    plan.views["i0"] = plan.views["i0"]._replace(state=type(plan.views["i0"].state).DRAINING)
    plan_drain(plan, set())
    plan_handoff(plan)
    assert len(plan.moves) == 2


def test_a_request_moves_for_gain_only_so_often() -> None:
    config = RebalanceConfig(request_cooldown=0.0, pair_cooldown=0.0, max_moves=2)
    loads = {"i0": (sequence("only", 60), sequence("x", 30)), "i1": ()}
    core = ready(loads, rebalance=config)
    core.migrations._cooldowns.moves.update(only=2, x=2)
    assert moves(core.handle(Tick(), 1.1)) == []
    core.migrations._cooldowns.moves.clear()
    assert moves(core.handle(Tick(), 2.2))


# ---- all together


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 90), st.sampled_from(list(RequestClass))), max_size=8),
        min_size=2,
        max_size=4,
    ),
    st.integers(0, 30),
)
def test_whatever_the_reasons_nothing_goes_back_and_forth(sizes, headroom) -> None:
    core = dispatcher(
        rebalance=RebalanceConfig(request_cooldown=2.0, pair_cooldown=1.0),
        load=LoadConfig(headroom_blocks=headroom),
    )
    world = World(core, blocks=100, slots=SLOTS)
    total = 0
    for index, entries in enumerate(sizes):
        name = f"i{index}"
        world.join(name)
        for number, (blocks, request_class) in enumerate(entries):
            request_id = f"r{index}.{number}"
            world.held[name][request_id] = sequence(request_id, blocks, request_class=request_class)
            total += 1
    world.run(40)
    settled = len(world.moves)
    assert settled <= total * core.config.rebalance.max_moves
    world.run(30)
    assert len(world.moves) == settled
    assert sum(len(held) for held in world.held.values()) == total


# ---- links


def migrated(seconds: float, size: int) -> MigrationReport:
    return MigrationReport("r", "1", "a", "b", "admin", "moved", 2, 4, size, 1, seconds)


def test_the_speed_of_links_is_learned_by_machines() -> None:
    links = LinkRates()
    here, there = info("a"), dataclasses.replace(info("b"), node="other")
    assert links.rate(here, there) == DEFAULT_RATE
    for _ in range(30):
        links.note(here, there, migrated(2.0, 200 << 20))
    assert links.rate(here, there) == pytest.approx(100 << 20, rel=0.01)
    assert links.rate(here, here) == DEFAULT_RATE
    links.note(here, here, migrated(5.0, 10))
    assert links.rate(here, here) == DEFAULT_RATE
    assert links.seconds(here, there, 10) == 10 * block_bytes(MODEL) / links.rate(here, there)


# ---- Llumnix's rules


def test_llumnix_counts_the_first_waiting_request_or_all() -> None:
    held = (sequence("a", 40), sequence("b", 10, False), sequence("c", 20, False))
    core = ready({"i0": held, "i1": ()})
    full, empty = core.members.views(1.0)
    assert remaining_steps(full, all_waiting=False) == (60 - 1 - 10) / 2
    assert remaining_steps(full, all_waiting=True) == (60 - 1 - 30) / 3
    assert remaining_steps(empty, all_waiting=True) == float("inf")


def test_llumnix_pairs_by_its_threshold_whatever_it_brings() -> None:
    few = tuple(sequence(f"a{n}", 9) for n in range(10))
    loads = {"i0": few, "i1": (sequence("b", 50),), "i2": (sequence("c", 60),)}
    assert RebalanceConfig().llumnix_threshold > (100 - 90 - 1) / 10
    core = ready(loads, placement="llumnix")
    assert moves(core.handle(Tick(), 1.1)) == [("balance", "a0", "i0", "i1")]
    core = ready({"i0": few[:5], "i1": ()}, placement="llumnix")
    assert moves(core.handle(Tick(), 1.1)) == []
    core = ready(loads, placement="infaas")
    assert moves(core.handle(Tick(), 1.1)) == []
