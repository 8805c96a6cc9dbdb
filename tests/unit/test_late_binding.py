"""Requests wait in the dispatcher until an instance has room, and not longer."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.dispatcher.core import Dispatcher
from cluster.dispatcher.events import (
    Finished,
    Joined,
    Place,
    PlaceRequested,
    Refuse,
    Reported,
    Tick,
)
from cluster.dispatcher.fairness import Source
from cluster.dispatcher.load import InstanceLoad, LoadConfig
from cluster.dispatcher.queues import LAST_RETRY, Rate, RequestQueues
from cluster.dispatcher.tenants import TenantPolicy
from instance.leases import ServiceReport
from instance.load import LoadReport
from instance.request import RequestClass
from tests.unit.dispatching import BLOCK_SIZE, ask, dispatcher, info, placed, report, sequence

INTERACTIVE, STANDARD, BATCH = RequestClass


def full(name: str, number: int, waiting: int = 0, **more: object) -> LoadReport:
    """An instance of 100 blocks, all used by one request, and others that wait."""
    held = [sequence(f"{name}-runs", 100, **more)]
    held += [sequence(f"{name}-waits-{n}", 5, running=False) for n in range(waiting)]
    return report(name, number, tuple(held), blocks=100)


def idle(name: str, number: int) -> LoadReport:
    return report(name, number, (), blocks=100)


def cluster(*names: str, **settings: object) -> Dispatcher:
    core = dispatcher(**{"run_ahead": 1, **settings})
    for name in names:
        core.handle(Joined(info(name, blocks=100)), 0.0)
        core.handle(Reported(full(name, 1, waiting=1)), 0.0)
    return core


def ids(actions: list) -> list[str]:
    return [one.placement.request_id for one in actions if isinstance(one, Place)]


def refusals(actions: list) -> list[tuple[str, int]]:
    return [(a.refusal.request_id, a.refusal.status) for a in actions if isinstance(a, Refuse)]


# ---- room


def test_a_full_instance_is_given_its_run_ahead_and_no_more() -> None:
    core = dispatcher(run_ahead=2)
    core.handle(Joined(info("i0", blocks=100)), 0.0)
    core.handle(Reported(full("i0", 1)), 0.0)
    asked = [core.handle(PlaceRequested(ask(f"r{n}", arrival=n)), 0.1) for n in range(4)]
    assert [ids(actions) for actions in asked] == [["r0"], ["r1"], [], []]
    assert core.num_held == 2
    # One that waited there runs now: the next one follows.
    there = (sequence("i0-runs", 90), sequence("r0", 7), sequence("r1", 7, running=False))
    assert ids(core.handle(Reported(report("i0", 2, there, blocks=100)), 0.2)) == ["r2"]


def test_an_instance_with_room_is_given_all_it_can_take_up() -> None:
    core = dispatcher(run_ahead=1)
    core.handle(Joined(info("i0", blocks=100, slots=64)), 0.0)
    core.handle(Reported(idle("i0", 1)), 0.0)
    # Each wants 7 blocks and one to grow into.
    asked = [core.handle(PlaceRequested(ask(f"r{n}", arrival=n)), 0.1) for n in range(20)]
    sent = sum(len(ids(actions)) for actions in asked)
    assert sent in (13, 14)
    assert core.num_held == 20 - sent


def test_interactive_requests_share_instances_while_these_keep_their_headroom() -> None:
    core = dispatcher(run_ahead=1, load=LoadConfig(headroom_blocks=60))
    running = {
        # Free and without an interactive request; 20, 28 and 30 blocks used beside one.
        "i0": (sequence("a", 10),),
        "i1": (sequence("b", 20, request_class=INTERACTIVE),),
        "i2": (sequence("c", 28, request_class=INTERACTIVE),),
        "i3": (sequence("d", 10, request_class=INTERACTIVE), sequence("e", 20)),
    }
    for name, held in running.items():
        core.handle(Joined(info(name, blocks=100)), 0.0)
        core.handle(Reported(report(name, 1, held, blocks=100)), 0.0)
    goes = [
        placed(core.handle(PlaceRequested(ask(f"r{n}", request_class=INTERACTIVE)), 0.1))
        for n in range(9)
    ]
    # Each wants 7 blocks: interactive ones leave 60 of 100 free on i1 with two more, on i2 with
    # one, and on i3, which others use too for now, with four.
    assert sorted(name for names in goes[:3] for name in names) == ["i1", "i1", "i2"]
    assert goes[3:7] == [["i3"]] * 4
    # They leave it nowhere with one more, so another instance takes them; then it is shared.
    assert goes[7:] == [["i0"], ["i0"]]
    # The others go where no headroom is taken off.
    assert placed(core.handle(PlaceRequested(ask("r9")), 0.1)) == ["i0"]


def test_others_take_headroom_rather_than_wait_but_not_batch_requests() -> None:
    core = dispatcher(run_ahead=1, load=LoadConfig(headroom_blocks=60))
    core.handle(Joined(info("i0", blocks=100)), 0.0)
    urgent = (sequence("a", 30, request_class=INTERACTIVE),)
    core.handle(Reported(report("i0", 1, urgent, blocks=100)), 0.0)

    def goes(name: str, request_class: RequestClass = STANDARD) -> list[str]:
        return placed(core.handle(PlaceRequested(ask(name, request_class=request_class)), 0.1))

    # Each wants 7 blocks: one has room beside the headroom, the next uses it.
    assert goes("r0") == goes("r1") == ["i0"]
    # One of batch is sent ahead, as everywhere; the next waits, and others pass it.
    assert goes("b0", BATCH) == ["i0"]
    assert goes("b1", BATCH) == []
    assert goes("r2") == ["i0"]
    assert core.num_held == 1


def test_headroom_is_left_while_there_is_room_elsewhere() -> None:
    core = dispatcher(run_ahead=1, load=LoadConfig(headroom_blocks=60))
    urgent = (sequence("a", 30, request_class=INTERACTIVE),)
    for name, held in {"i0": urgent, "i1": (sequence("b", 80),)}.items():
        core.handle(Joined(info(name, blocks=100)), 0.0)
        core.handle(Reported(report(name, 1, held, blocks=100)), 0.0)
    asked = [core.handle(PlaceRequested(ask(f"r{n}", arrival=n)), 0.1) for n in range(4)]
    # Room for one beside the headroom of i0, and for two on i1.
    names = [name for actions in asked for name in placed(actions)]
    assert sorted(names[:3]) == ["i0", "i1", "i1"]
    assert names[3:] == ["i0"]


@given(
    st.lists(
        st.tuples(
            st.integers(1, 9),
            st.sampled_from(RequestClass),
            st.sampled_from(["reported", "ended", "charged", "arriving"]),
        ),
        max_size=8,
    ),
    st.booleans(),
)
def test_interactive_requests_are_counted_with_their_kv_wherever_they_are(held, seen) -> None:
    found = [
        (sequence(f"r{n}", blocks, request_class=kind), how)
        for n, (blocks, kind, how) in enumerate(held)
    ]
    config = LoadConfig(headroom_blocks=30)
    load = InstanceLoad(info("i0", blocks=100), 0.0)
    there = tuple(one for one, how in found if how in ("reported", "ended"))
    load.accept(report("i0", 1, there, blocks=100), 0.0)
    if seen:  # then sums are kept up to date, else they are made anew
        load.view(0.0, config)
    for one, how in found:
        if how == "ended":
            load.ended(one.request_id, 1)
        elif how == "charged":
            load.charge(one, 0.0)
        elif how == "arriving":
            load.arrives(one, True)
    view = load.view(0.0, config)
    left = [one for one, how in found if how != "ended" and one.request_class == INTERACTIVE]
    assert view.interactive == len(left)
    assert view.interactive_blocks == sum(one.blocks for one in left)
    assert view.shared_room == (70 - view.interactive_blocks if left else 0)


def test_batch_slots_are_room_too() -> None:
    core = dispatcher(run_ahead=1)
    core.handle(Joined(info("i0", blocks=1000, slots=3)), 0.0)
    core.handle(Reported(report("i0", 1)), 0.0)
    asked = [core.handle(PlaceRequested(ask(f"r{n}", arrival=n)), 0.1) for n in range(6)]
    assert sum(len(ids(actions)) for actions in asked) == 4


def test_without_a_limit_everything_is_sent_on() -> None:
    core = cluster("i0", run_ahead=None)
    assert all(core.handle(PlaceRequested(ask(f"r{n}")), 0.1) for n in range(50))


def test_an_instance_that_could_never_hold_it_gets_the_request_to_say_so() -> None:
    core = dispatcher(run_ahead=1)
    core.handle(Joined(info("i0", blocks=100)), 0.0)
    core.handle(Reported(idle("i0", 1)), 0.0)
    assert ids(core.handle(PlaceRequested(ask("huge", tokens=100_000)), 0.1)) == ["huge"]


@given(
    loads=st.lists(
        st.lists(st.tuples(st.integers(1, 60), st.booleans()), max_size=5), min_size=1, max_size=4
    ),
    requests=st.lists(
        st.tuples(st.integers(1, 900), st.sampled_from("ab"), st.sampled_from(RequestClass)),
        min_size=1,
        max_size=12,
    ),
    run_ahead=st.integers(1, 3),
)
def test_nothing_is_held_while_an_instance_has_room(loads, requests, run_ahead) -> None:
    """Whoever is held would run nowhere at once, and enough of the others wait at instances."""
    core = dispatcher(run_ahead=run_ahead)
    for at, held in enumerate(loads):
        used = 0
        found = []
        for number, (blocks, running) in enumerate(held):
            running = running and used + blocks <= 100
            used += blocks if running else 0
            found.append(sequence(f"s{at}.{number}", blocks, running))
        core.handle(Joined(info(f"i{at}", blocks=100)), 0.0)
        core.handle(Reported(report(f"i{at}", 1, tuple(found), blocks=100)), 0.0)
    actions = []
    for number, (tokens, tenant, request_class) in enumerate(requests):
        request = ask(f"r{number}", tokens=tokens, tenant=tenant, request_class=request_class)
        actions += core.handle(PlaceRequested(request), 0.1)
    if core.num_held:
        views = core.members.views(0.1)
        rooms = [core.members.loads[view.instance_id].room(view) for view in views]
        most = max(room.slack for room in rooms)
        assert all(held.request.num_tokens >= most for held in core.placing.queues)
        there = [one for view in views for one in core.members.loads[view.instance_id].to_wait()]
        late = [one for one in there if one.request_id in ids(actions)]
        assert len(late) >= run_ahead or all(room.waiting >= run_ahead for room in rooms)


def test_small_ones_pass_a_large_one_that_runs_nowhere_but_not_where_it_waits() -> None:
    core = dispatcher(run_ahead=1)
    for name, used in (("i0", 70), ("i1", 60)):
        core.handle(Joined(info(name, blocks=100)), 0.0)
        core.handle(Reported(report(name, 1, (sequence(name, used),), blocks=100)), 0.0)
    asked = [("large", 900), ("large too", 800), ("small", 100), ("another", 100)]
    goes = [
        placed(core.handle(PlaceRequested(ask(name, tokens=tokens, arrival=at)), 0.1))
        for at, (name, tokens) in enumerate(asked)
    ]
    # The first one waits where it fits soonest; the second one holds nobody up.
    assert not goes[1]
    (waits_at,) = goes[0]
    other = {"i0": "i1", "i1": "i0"}[waits_at]
    assert goes[2:] == [[other], [other]]
    # Room where the first one waits is for it alone, until it runs.
    left = [sequence("large", 57, running=False)]
    busy = sequence(waits_at, 50)
    core.handle(Reported(report(waits_at, 2, (busy, *left), blocks=100)), 0.2)
    assert placed(core.handle(PlaceRequested(ask("third", tokens=100, arrival=5)), 0.3)) == [other]
    # Then the second one waits there.
    runs = sequence("large", 57)
    actions = core.handle(Reported(report(waits_at, 3, (runs,), blocks=100)), 0.4)
    assert ids(actions) == ["large too"]
    assert placed(actions) == [waits_at]


def test_one_of_so_many_instances_has_a_request_that_waits_for_memory() -> None:
    core = dispatcher(run_ahead=1, instances_per_wait=2)
    for at in range(5):
        core.handle(Joined(info(f"i{at}", blocks=100)), 0.0)
        core.handle(Reported(full(f"i{at}", 1)), 0.0)
    asked = [core.handle(PlaceRequested(ask(f"r{n}", arrival=n)), 0.1) for n in range(5)]
    assert [bool(placed(actions)) for actions in asked] == [True, True, False, False, False]
    # One of them is asked for anew, for want of an answer from its instance: it waits elsewhere.
    (first,) = placed(asked[0])
    again = core.handle(PlaceRequested(ask("r0", epoch=2, arrival=0, avoid=(first,))), 0.2)
    assert ids(again) == ["r0"]
    assert placed(again) != [first]
    assert core.num_held == 3


# ---- preemptible room


def ahead(core: Dispatcher, tenant: str, counter: float, theta: float = 100.0) -> None:
    """Tell the ledger that a tenant has received service from i0, whose theta is given."""
    charged = ((tenant, STANDARD), counter)
    core.ledger.report(Source("i0", "a"), ServiceReport((charged,), theta=theta), 0.0)


def test_who_may_preempt_has_room_on_a_full_instance() -> None:
    core = cluster("i0")  # what runs and waits there is the default tenant's
    for at, (name, tenant) in enumerate(
        (("same", "default"), ("behind", "other"), ("again", "other"))
    ):
        assert core.handle(PlaceRequested(ask(name, tenant=tenant, arrival=at)), 0.1) == []
    ahead(core, "default", 1000.0)
    assert ids(core.handle(Tick(), 0.2)) == ["behind"]
    assert ids(core.handle(Tick(), 0.3)) == []  # one that waits there before it is enough
    assert core.num_held == 2


def test_a_small_lead_is_no_reason_to_preempt() -> None:
    core = cluster("i0")
    core.handle(PlaceRequested(ask("behind", tenant="other")), 0.1)
    ahead(core, "default", 90.0)
    assert ids(core.handle(Tick(), 0.2)) == []


def test_a_higher_class_has_room_where_a_lower_one_runs() -> None:
    core = cluster("i0")
    urgent = ask("urgent", request_class=INTERACTIVE)
    assert ids(core.handle(PlaceRequested(ask("batch", request_class=BATCH)), 0.1)) == []
    assert ids(core.handle(PlaceRequested(urgent), 0.1)) == ["urgent"]


# ---- order


def test_held_requests_leave_by_class_then_counter_then_arrival() -> None:
    core = cluster("i0")
    core.ledger.report(
        Source("i0", "a"),
        ServiceReport(((("rich", STANDARD), 50.0), (("poor", STANDARD), 10.0)), theta=1e9),
        0.0,
    )
    held = [
        ask("batch", tenant="poor", request_class=BATCH, arrival=0.0),
        ask("rich-1", tenant="rich", arrival=1.0),
        ask("rich-2", tenant="rich", arrival=2.0),
        ask("poor-2", tenant="poor", arrival=4.0),
        ask("poor-1", tenant="poor", arrival=3.0),
    ]
    for request in held:
        assert core.handle(PlaceRequested(request), 0.1) == []
    actions = core.handle(Reported(report("i0", 2, (), blocks=1000)), 0.2)
    assert ids(actions) == ["poor-1", "poor-2", "rich-1", "rich-2", "batch"]


# ---- asking again


def test_asking_again_changes_nothing_and_keeps_the_request_alive() -> None:
    core = cluster("i0", home_timeout=10.0)
    for now in (0.0, 8.0, 16.0, 24.0):
        core.handle(Reported(full("i0", 2 + int(now), waiting=1)), now)
        assert core.handle(PlaceRequested(ask("kept")), now) == []
        core.handle(Tick(), now)
    assert core.num_held == 1
    core.handle(Reported(full("i0", 100, waiting=1)), 34.1)
    assert core.handle(Tick(), 34.1) == []  # nobody is there to answer
    assert core.num_held == 0
    assert len(core.placing.waiting) == 1  # what the instance reports


def test_the_end_of_a_held_request_is_answered_and_forgotten() -> None:
    core = cluster("i0")
    core.handle(PlaceRequested(ask("r")), 0.1)
    assert refusals(core.handle(Finished("r", 1), 0.2)) == [("r", 404)]
    assert core.num_held == 0


def test_a_replay_takes_the_place_of_what_was_held() -> None:
    core = cluster("i0")
    core.handle(PlaceRequested(ask("r")), 0.1)
    assert refusals(core.handle(PlaceRequested(ask("r", 2)), 0.2)) == [("r", 404)]
    assert refusals(core.handle(PlaceRequested(ask("r", 1)), 0.3)) == [("r", 404)]
    (place,) = [one for one in core.handle(Reported(idle("i0", 2)), 0.4) if isinstance(one, Place)]
    assert place.placement.epoch == 2


# ---- limits


def test_a_tenants_own_limit_is_429_and_the_clusters_503() -> None:
    small = TenantPolicy(max_queued=1)
    core = cluster("i0", tenants={"small": small}, max_queued=3)

    def asked(name: str, tenant: str, epoch: int = 1) -> list[tuple[str, int]]:
        return refusals(core.handle(PlaceRequested(ask(name, epoch, tenant=tenant)), 0.1))

    assert asked("s1", "small") == []
    assert asked("s2", "small") == [("s2", 429)]
    assert asked("s3", "small", 2) == []  # a replay is never refused
    assert asked("o1", "other") == []
    assert asked("o2", "other") == [("o2", 503)]
    assert core.num_held == 3
    assert dict(core.counters["refusals"]) == {"429": 1, "503": 1}


def test_lower_classes_do_not_use_up_the_room_of_higher_ones() -> None:
    core = cluster("i0", max_queued=2)
    for number in range(2):
        core.handle(PlaceRequested(ask(f"b{number}", request_class=BATCH)), 0.1)
    more = core.handle(PlaceRequested(ask("b2", request_class=BATCH)), 0.1)
    assert refusals(more) == [("b2", 503)]
    assert core.handle(PlaceRequested(ask("s0")), 0.1) == []


def test_a_class_that_a_tenant_may_not_use() -> None:
    core = cluster("i0", tenants={"slow": TenantPolicy(classes=(BATCH,))})
    (action,) = core.handle(PlaceRequested(ask("r", tenant="slow")), 0.1)
    assert isinstance(action, Refuse)
    assert (action.refusal.status, action.refusal.code) == (403, "class_not_allowed")


def test_a_deadline_ends_a_held_request() -> None:
    core = cluster("i0")
    assert core.handle(PlaceRequested(ask("r", time_left=0.5)), 0.1) == []
    assert core.handle(Tick(), 0.5) == []
    (action,) = core.handle(Tick(), 0.7)
    assert isinstance(action, Refuse)
    assert (action.refusal.status, action.refusal.code) == (408, "deadline_exceeded")
    late = core.handle(PlaceRequested(ask("late", time_left=0.0)), 0.8)
    assert refusals(late) == [("late", 408)]


def test_retry_after_follows_the_rate_of_service() -> None:
    queues = RequestQueues()
    assert queues.wait(0.0) == LAST_RETRY
    for number in range(2000):
        queues.served("a", number * 0.1)
    assert queues.wait(200.0) == 1.0
    assert math.isclose(queues._served.at(200.0), 10.0, rel_tol=0.05)
    assert queues.tenant_wait("b", 200.0) == LAST_RETRY


def test_a_rate_is_forgotten() -> None:
    rate = Rate()
    rate.note(0.0)
    assert rate.at(1.0) > rate.at(100.0) > 0


# ---- accounting


@given(st.data())
def test_waiting_sets_hold_exactly_what_waits(data: st.DataObject) -> None:
    """Whatever is placed, reported, lost and ended in whatever order, nothing stays behind."""
    core = cluster("i0", "i1", run_ahead=2)
    live: dict[str, int] = {}
    numbers = {"i0": 1, "i1": 1}
    where: dict[str, str] = {}
    now = 0.1
    for step in range(data.draw(st.integers(1, 25))):
        now += 0.1
        kind = data.draw(st.sampled_from(("ask", "ask", "report", "end", "replay")))
        actions = []
        if kind == "ask":
            live[f"r{step}"] = 1
            actions = core.handle(PlaceRequested(ask(f"r{step}")), now)
        elif kind == "report":
            name = data.draw(st.sampled_from(("i0", "i1")))
            numbers[name] += 1
            there = [one for one, place in where.items() if place == name and one in live]
            found = tuple(
                sequence(one, 5, data.draw(st.booleans()), live[one]) for one in sorted(there)
            )
            actions = core.handle(Reported(report(name, numbers[name], found, blocks=100)), now)
        elif live:
            name = data.draw(st.sampled_from(sorted(live)))
            if kind == "end":
                actions = core.handle(Finished(name, live.pop(name)), now)
            else:
                live[name] += 1
                where.pop(name, None)
                actions = core.handle(PlaceRequested(ask(name, live[name])), now)
        for action in actions:
            if isinstance(action, Place):
                where[action.placement.request_id] = action.placement.instance_id
    for name, epoch in list(live.items()):
        core.handle(Finished(name, epoch), now)
    for name in numbers:
        core.handle(Reported(report(name, numbers[name] + 1, (), blocks=100)), now)
    assert core.num_held == 0
    assert len(core.placing.waiting) == 0
    assert all(not book.waiting for book in core.ledger.accounts.values())
    assert all(not load.charges for load in core.members.loads.values())


def test_placing_and_moving_do_not_end_waiting() -> None:
    core = dispatcher(run_ahead=2)
    core.handle(Joined(info("i0", blocks=100)), 0.0)
    core.handle(Reported(full("i0", 1)), 0.0)
    waiting = core.ledger.accounts

    def waits() -> bool:
        return "r" in waiting["default", STANDARD].waiting

    assert placed(core.handle(PlaceRequested(ask("r")), 0.1)) == ["i0"]
    assert waits()
    core.handle(Reported(full("i0", 2)), 0.2)  # made before it arrived there
    assert waits()
    there = sequence("r", 7, running=False)
    core.handle(Reported(report("i0", 3, (there,), blocks=100)), 0.3)
    assert waits()
    moving = sequence("r", 7, running=True, migrating=True)
    core.handle(Reported(report("i0", 4, (moving,), blocks=100)), 0.4)
    assert waits()
    core.handle(Reported(report("i0", 5, (sequence("r", 7),), blocks=100)), 0.5)
    assert not waits()


@pytest.mark.parametrize("tokens", [1, BLOCK_SIZE, 1000])
def test_room_is_counted_in_tokens_of_the_instance(tokens: int) -> None:
    core = dispatcher(run_ahead=1)
    core.handle(Joined(info("i0", blocks=100)), 0.0)
    core.handle(Reported(report("i0", 1, (sequence("s", 20),), blocks=100)), 0.0)
    view = core.members.views(0.0)[0]
    room = core.members.loads["i0"].room(view)
    assert room == ((80 - 1) * BLOCK_SIZE, 0, False)
    assert ids(core.handle(PlaceRequested(ask("r", tokens=tokens)), 0.1)) == ["r"]
