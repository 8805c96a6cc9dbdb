"""Placement and load accounting of the dispatcher's core."""

import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.dispatcher.core import Dispatcher, DispatcherConfig
from cluster.dispatcher.events import (
    Finished,
    Joined,
    Left,
    Place,
    PlaceRequested,
    Refuse,
    Reported,
    Tick,
)
from cluster.dispatcher.load import InstanceLoad, LoadConfig, blocks_for
from cluster.dispatcher.placement import POLICIES
from cluster.dispatcher.rebalance import spare, with_arrival, without
from cluster.dispatcher.requests import RequestConfig
from cluster.dispatcher.views import InstanceState
from instance.request import RequestClass
from tests.unit.dispatching import (
    BLOCK_SIZE,
    World,
    ask,
    dispatcher,
    info,
    placed,
    report,
    sequence,
)

NAMES = ["i0", "i1", "i2"]


def joined(core: Dispatcher, *names: str, now: float = 0.0) -> Dispatcher:
    for name in names:
        core.handle(Joined(info(name)), now)
        core.handle(Reported(report(name, 1)), now)
    return core


# ---- freeness


def view_of(*sequences, blocks=100, draining=False, headroom=0):
    load = InstanceLoad(info("i0", blocks=blocks), 0.0)
    load.accept(report("i0", 1, sequences, blocks=blocks, draining=draining), 0.0)
    return load.view(0.0, LoadConfig(headroom_blocks=headroom))


def test_freeness_is_free_blocks_after_demand_per_running_request() -> None:
    view = view_of(sequence("a", 20), sequence("b", 30))
    assert view.rebalancing_freeness() == (100 - 50) / 2
    assert view.placement_freeness() == (100 - 50) / 2
    assert view_of().placement_freeness() == 100


def test_rebalancing_counts_the_first_waiting_request_only() -> None:
    view = view_of(sequence("a", 40), sequence("b", 10, False), sequence("c", 20, False))
    assert view.rebalancing_freeness() == (100 - 40 - 10) / 2
    assert view.placement_freeness() == (100 - 40 - 10 - 20) / 3


def test_a_shortage_is_not_divided() -> None:
    view = view_of(sequence("a", 45), sequence("b", 45), sequence("c", 50, False))
    assert view.rebalancing_freeness() == 100 - 90 - 50


def test_draining_instances_are_never_free() -> None:
    assert view_of(draining=True).placement_freeness() == -math.inf
    assert view_of(draining=True).rebalancing_freeness() == -math.inf


def test_headroom_is_kept_for_interactive_requests() -> None:
    calm = view_of(sequence("a", 10), headroom=30)
    assert calm.placement_freeness() == 90
    urgent = view_of(sequence("a", 10, request_class=RequestClass.INTERACTIVE), headroom=30)
    assert urgent.placement_freeness() == 60


@given(st.integers(1, 5), st.integers(0, 40), st.integers(1, 20))
def test_headroom_is_shared_by_the_interactive_requests_and_goes_with_the_last(
    count: int, reserve: int, blocks: int
) -> None:
    urgent = [
        sequence(f"u{n}", blocks, request_class=RequestClass.INTERACTIVE) for n in range(count)
    ]
    view = view_of(sequence("a", 10), *urgent, blocks=200, headroom=reserve)
    assert view.headroom == reserve
    for left in reversed(range(count)):
        before, view = view, without(view, urgent[left], None)
        assert view.headroom == (reserve if left else 0)
        back = with_arrival(view, urgent[left])
        assert (back.headroom, back.free, back.running) == (reserve, before.free, before.running)
    # What is kept free for them, others may not take and they may.
    last = view_of(urgent[0], blocks=blocks + 20, headroom=15)
    assert spare(last, urgent[0]) == 20
    assert spare(last, sequence("b", 1)) == 5


# ---- states


def test_silence_makes_an_instance_suspect_then_gone_and_it_may_come_back() -> None:
    core = joined(dispatcher(), "i0")
    assert core.members.state("i0", 1.0) is InstanceState.READY
    assert core.members.state("i0", 2.0) is InstanceState.SUSPECT
    assert core.members.state("i0", 11.0) is InstanceState.GONE
    core.handle(Tick(), 11.0)
    assert core.view(11.0).instances == ()
    core.handle(Reported(report("i0", 2)), 12.0)
    assert core.members.state("i0", 12.0) is InstanceState.READY


def test_an_instance_gone_for_long_is_forgotten_and_must_join_again() -> None:
    core = joined(dispatcher(), "i0")
    core.handle(Tick(), 1000.0)
    assert not core.members.knows("i0", "a")


def test_the_version_follows_membership_and_state() -> None:
    core = dispatcher()
    versions = [core.members.version]
    for event, now in (
        (Joined(info("i0")), 0.0),
        (Tick(), 3.0),
        (Reported(report("i0", 1)), 3.1),
        (Joined(info("i0", "b")), 3.2),
        (Left("i0", "b"), 3.3),
    ):
        core.handle(event, now)
        versions.append(core.members.version)
    assert versions == sorted(set(versions))
    core.handle(Tick(), 3.4)
    assert core.members.version == versions[-1]


def test_a_late_goodbye_of_an_older_incarnation_is_ignored() -> None:
    core = joined(dispatcher(), "i0")
    core.handle(Joined(info("i0", "b")), 0.1)
    core.handle(Left("i0", "a"), 0.2)
    assert core.members.state("i0", 0.2) is InstanceState.READY


# ---- charging


@given(
    count=st.integers(1, 60),
    instances=st.integers(1, 8),
    tokens=st.integers(1, 2000),
    policy=st.sampled_from(["freeness", "least_loaded", "round_robin"]),
)
def test_a_burst_does_not_herd(count: int, instances: int, tokens: int, policy: str) -> None:
    core = joined(
        dispatcher(placement=policy, run_ahead=None), *(f"i{n}" for n in range(instances))
    )
    chosen = Counter({f"i{n}": 0 for n in range(instances)})
    for number in range(count):
        chosen.update(placed(core.handle(PlaceRequested(ask(f"r{number}", tokens=tokens)), 0.0)))
    assert sum(chosen.values()) == count
    assert max(chosen.values()) - min(chosen.values()) <= 1


@st.composite
def histories(draw):
    """Placements, ends and reports of one instance, the reports in any order and number."""
    events = []
    number = 0
    live: dict[str, int] = {}
    for index in range(draw(st.integers(1, 20))):
        kind = draw(st.sampled_from(["place", "end", "report", "old report", "other report"]))
        if kind == "place":
            live[f"r{index}"] = draw(st.integers(1, 300))
            events.append(("place", f"r{index}", live[f"r{index}"]))
        elif kind == "end" and live:
            name = draw(st.sampled_from(sorted(live)))
            del live[name]
            events.append(("end", name, 0))
        elif kind == "report":
            number += 1
            seen = draw(st.lists(st.sampled_from(sorted(live)), unique=True)) if live else []
            events.append(("report", number, tuple(seen)))
        elif kind == "old report" and number:
            events.append(("report", draw(st.integers(0, number)), ()))
        elif kind == "other report":
            events.append(("other", number + 1, ()))
    return events


@given(histories())
def test_load_equals_a_recomputation_from_the_newest_report(events) -> None:
    core = dispatcher()
    core.handle(Joined(info("i0")), 0.0)
    newest = -1
    reported: dict[str, int] = {}
    charged: dict[str, int] = {}
    tokens: dict[str, int] = {}
    for kind, key, value in events:
        if kind == "place":
            core.handle(PlaceRequested(ask(key, tokens=value)), 0.0)
            tokens[key] = charged[key] = blocks_for(value + 1, BLOCK_SIZE)
        elif kind == "end":
            core.handle(Finished(key, 1), 0.0)
            charged.pop(key, None)
            reported.pop(key, None)
        elif kind == "other":
            core.handle(Reported(report("i0", key, (), incarnation="b")), 0.0)
        else:
            sequences = tuple(sequence(name, tokens[name]) for name in value)
            core.handle(Reported(report("i0", key, sequences)), 0.0)
            if key > newest:
                newest = key
                reported = {name: tokens[name] for name in value}
                for name in value:
                    charged.pop(name, None)
        view = core.members.view(core.members.loads["i0"], 0.0)
        assert view.free == 1000 - sum(reported.values()) - sum(charged.values())
        assert view.running == len(reported) + len(charged)


def test_a_charge_that_no_report_confirms_expires() -> None:
    core = joined(dispatcher(), "i0")
    core.handle(PlaceRequested(ask("r")), 0.0)
    core.handle(Reported(report("i0", 2)), 29.0)
    core.handle(Tick(), 29.0)
    assert core.members.loads["i0"].charges
    core.handle(Tick(), 31.0)
    assert not core.members.loads["i0"].charges


def test_a_replay_moves_the_charge() -> None:
    core = joined(dispatcher(), "i0", "i1")
    (first,) = placed(core.handle(PlaceRequested(ask("r")), 0.0))
    (second,) = placed(core.handle(PlaceRequested(ask("r", 2, avoid=(first,))), 0.1))
    assert second != first
    assert not core.members.loads[first].charges
    assert core.members.loads[second].charges["r"].sequence.epoch == 2


# ---- placement


@pytest.mark.parametrize("policy", sorted(POLICIES))
@given(
    loads=st.lists(
        st.lists(st.tuples(st.integers(1, 400), st.booleans()), max_size=6), min_size=1, max_size=5
    ),
    tokens=st.integers(1, 100_000),
    seed=st.integers(0, 2**32),
)
def test_every_policy_answers_when_an_instance_is_ready(policy, loads, tokens, seed) -> None:
    core = Dispatcher(
        DispatcherConfig(placement=policy, requests=RequestConfig(run_ahead=None)),
        random.Random(seed),
    )
    for index, sizes in enumerate(loads):
        core.handle(Joined(info(f"i{index}")), 0.0)
        found = tuple(
            sequence(f"s{index}.{n}", blocks, running) for n, (blocks, running) in enumerate(sizes)
        )
        core.handle(Reported(report(f"i{index}", 1, found)), 0.0)
    actions = core.handle(PlaceRequested(ask("r", tokens=tokens)), 0.0)
    assert placed(actions)[0] in core.members.loads


def test_unknown_policy() -> None:
    with pytest.raises(ValueError, match=r"unknown placement policy 'best'.*freeness"):
        dispatcher(placement="best")


def test_power_of_two_takes_the_better_of_two_different_instances() -> None:
    core = joined(dispatcher(placement="power_of_two"), "i0", "i1")
    core.handle(Reported(report("i0", 2, (sequence("a", 900),))), 0.0)
    for number in range(20):
        assert placed(core.handle(PlaceRequested(ask(f"r{number}", tokens=1)), 0.0)) == ["i1"]


def test_random_reaches_every_instance() -> None:
    core = joined(dispatcher(placement="random"), *NAMES)
    chosen = {
        name
        for number in range(100)
        for name in placed(core.handle(PlaceRequested(ask(f"r{number}")), 0.0))
    }
    assert chosen == set(NAMES)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3), st.booleans()), max_size=40),
)
def test_repeated_calls_get_the_same_answer_and_are_charged_once(calls) -> None:
    core = joined(dispatcher(), *NAMES)
    answers: dict[tuple[int, int], str] = {}
    newest: dict[int, int] = {}
    over: dict[int, int] = {}
    for request, epoch, ends in calls:
        if ends:
            core.handle(Finished(f"r{request}", epoch), 0.0)
            over[request] = max(over.get(request, 0), epoch)
            newest[request] = max(newest.get(request, 0), epoch)
            continue
        (action,) = core.handle(PlaceRequested(ask(f"r{request}", epoch)), 0.0)
        if epoch < newest.get(request, 0) or epoch <= over.get(request, 0):
            assert isinstance(action, Refuse)
            assert action.refusal.status == 404
            continue
        newest[request] = epoch
        assert isinstance(action, Place)
        chosen = action.placement.instance_id
        assert answers.setdefault((request, epoch), chosen) == chosen
        holders = [n for n in NAMES if f"r{request}" in core.members.loads[n].charges]
        assert holders == [chosen]


def test_a_repeated_call_that_avoids_the_answer_gets_another() -> None:
    core = joined(dispatcher(), "i0", "i1")
    (first,) = placed(core.handle(PlaceRequested(ask("r")), 0.0))
    (second,) = placed(core.handle(PlaceRequested(ask("r", avoid=(first,))), 0.0))
    assert {first, second} == {"i0", "i1"}


def test_a_suspect_instance_is_better_than_none_but_worse_than_a_ready_one() -> None:
    core = joined(dispatcher(), "i0", "i1")
    core.handle(Reported(report("i1", 2, (sequence("a", 900),))), 3.0)
    assert placed(core.handle(PlaceRequested(ask("r0")), 3.0)) == ["i1"]
    core = joined(dispatcher(), "i0")
    assert placed(core.handle(PlaceRequested(ask("r1")), 3.0)) == ["i0"]


def test_a_request_goes_where_it_fits_and_where_its_model_is() -> None:
    core = dispatcher()
    core.handle(Joined(info("big", blocks=1000)), 0.0)
    core.handle(Joined(info("small", blocks=50)), 0.0)
    core.handle(Reported(report("big", 1, (sequence("a", 990),))), 0.0)
    assert placed(core.handle(PlaceRequested(ask("r0", tokens=5000)), 0.0)) == ["big"]
    assert placed(core.handle(PlaceRequested(ask("r1", tokens=50)), 0.0)) == ["small"]


# ---- waiting for an instance


def test_requests_are_held_until_an_instance_joins_in_order_of_class_and_arrival() -> None:
    core = dispatcher()
    for name, request_class, arrival in (
        ("late", RequestClass.STANDARD, 2.0),
        ("batch", RequestClass.BATCH, 0.0),
        ("early", RequestClass.STANDARD, 1.0),
        ("urgent", RequestClass.INTERACTIVE, 3.0),
    ):
        request = ask(name, request_class=request_class, arrival=arrival)
        assert core.handle(PlaceRequested(request), 0.0) == []
    assert core.num_held == 4
    actions = core.handle(Joined(info("i0")), 1.0)
    order = [a.placement.request_id for a in actions if isinstance(a, Place)]
    assert order == ["urgent", "early", "late", "batch"]
    assert core.num_held == 0


def test_a_held_request_is_refused_at_its_deadline_with_retry_after() -> None:
    core = dispatcher(hold_timeout=5.0, replay_hold_timeout=30.0, home_timeout=60.0)
    core.handle(PlaceRequested(ask("new")), 0.0)
    core.handle(PlaceRequested(ask("replay", 2)), 0.0)
    assert core.handle(Tick(), 4.9) == []
    (action,) = core.handle(Tick(), 5.0)
    assert isinstance(action, Refuse)
    assert (action.refusal.request_id, action.refusal.status) == ("new", 503)
    assert action.refusal.retry_after > 0
    (action,) = core.handle(Tick(), 30.0)
    assert isinstance(action, Refuse)
    assert (action.refusal.request_id, action.refusal.status) == ("replay", 503)


def test_a_replay_is_held_however_many_wait() -> None:
    core = dispatcher(max_queued=1)
    assert core.handle(PlaceRequested(ask("a")), 0.0) == []
    (action,) = core.handle(PlaceRequested(ask("b")), 0.0)
    assert isinstance(action, Refuse)
    assert action.refusal.status == 503
    assert action.refusal.retry_after > 0
    assert core.handle(PlaceRequested(ask("c", 2)), 0.0) == []


def test_a_held_request_that_ends_or_is_replayed_is_answered_once() -> None:
    core = dispatcher()
    core.handle(PlaceRequested(ask("a")), 0.0)
    assert core.handle(PlaceRequested(ask("a")), 0.0) == []
    (action,) = core.handle(PlaceRequested(ask("a", 2)), 0.0)
    assert isinstance(action, Refuse)
    assert action.refusal.epoch == 1
    (action,) = core.handle(Finished("a", 2), 0.0)
    assert isinstance(action, Refuse)
    assert action.refusal.epoch == 2
    assert core.handle(Joined(info("i0")), 0.0) == []


def test_an_instance_to_avoid_takes_the_request_once_it_is_known_to_live() -> None:
    core = joined(dispatcher(), "i0")
    assert core.handle(PlaceRequested(ask("r", 2, avoid=("i0",))), 0.1) == []
    assert core.handle(Tick(), 0.2) == []
    assert placed(core.handle(Reported(report("i0", 2)), 0.5)) == ["i0"]
    core = joined(dispatcher(), "i0")
    assert core.handle(PlaceRequested(ask("r", 2, avoid=("i0",))), 0.1) == []
    assert placed(core.handle(Joined(info("i0", "b")), 2.0)) == ["i0"]


def test_a_restarted_dispatcher_learns_from_reports_where_requests_are() -> None:
    world = World(dispatcher())
    for name in NAMES:
        world.join(name)
    for number in range(9):
        world.place(ask(f"r{number}"))
    world.core = dispatcher()
    for name in NAMES:
        assert not world.core.members.knows(name, "a")
        world.core.handle(Joined(info(name)), 0.0)
        world.report(name)
    for name in NAMES:
        for request_id in world.held[name]:
            found = world.core.locate(request_id, 0.0)
            assert found is not None
            assert found[0].info.instance_id == name


def test_an_ended_request_frees_its_memory_before_the_next_report() -> None:
    core = joined(dispatcher(), "i0")
    held = (sequence("a", 30), sequence("b", 20, running=False), sequence("c", 10, epoch=2))
    core.handle(Reported(report("i0", 2, held)), 0.0)
    core.handle(Finished("a", 1), 0.1)
    core.handle(Finished("b", 1), 0.1)
    core.handle(Finished("c", 1), 0.1)
    view = core.members.view(core.members.loads["i0"], 0.1)
    assert (view.free, view.running, view.waiting) == (1000 - 10, 1, ())
    core.handle(Finished("a", 1), 0.1)
    assert core.members.view(core.members.loads["i0"], 0.1) == view
    core.handle(Reported(report("i0", 3, held[2:])), 0.2)
    assert core.members.view(core.members.loads["i0"], 0.2).free == 1000 - 10
