"""Columns of loads: they say what each load says by itself."""

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cluster.dispatcher.core import Dispatcher
from cluster.dispatcher.events import Joined, PlaceRequested, Reported
from cluster.dispatcher.load import LoadConfig
from cluster.dispatcher.members import Members
from cluster.dispatcher.predicted import block_seconds
from cluster.dispatcher.table import STATES
from cluster.dispatcher.views import InstanceState
from instance.budget import StepCosts
from instance.load import LoadReport, SequenceLoad
from instance.request import RequestClass
from tests.unit.dispatching import MODEL, ask, dispatcher, info, placed, report, sequence

COSTS = StepCosts(0.024, 2e-4, 1e-8, 1e-4, 2.4e-6)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["join", "report", "draining", "drain", "leave", "expire", "wait"]),
            st.integers(0, 2),
            st.sampled_from([0.0, 0.4, 1.4, 1.5, 1.6, 8.6, 700.0]),
        ),
        max_size=40,
    )
)
def test_states_and_their_version_follow_every_load(
    events: list[tuple[str, int, float]],
) -> None:
    config = LoadConfig()
    members = Members(config, 1)
    now, version = 0.0, 1
    before: dict[str, InstanceState] = {}
    for number, (kind, which, seconds) in enumerate(events):
        now += seconds
        name = f"i{which}"
        known = name in members.loads
        if kind == "join":
            members.join(info(name, f"a{number}"), now)
        elif known and kind in ("report", "draining"):
            life = members.loads[name].info.incarnation
            told = report(name, number, incarnation=life, draining=kind == "draining")
            members.report(told, now)
        elif known and kind == "drain":
            members.set_draining(name, on=True)
        elif known and kind == "leave":
            members.leave(name, members.loads[name].info.incarnation)
        elif kind == "expire":
            members.expire(now)
        members.update_version(now)
        states = members.table.states(now)
        found = {one: STATES[states[row]] for one, row in members.table.rows.items()}
        assert found == {one: load.state(now, config) for one, load in members.loads.items()}
        vacant = set(range(members.table.size)) - set(members.table.rows.values())
        assert all(STATES[states[row]] == "gone" for row in vacant)
        # One that is forgotten was gone before, or would be found gone now.
        after = dict.fromkeys(before, InstanceState.GONE) | found
        changed = any(after[one] is not state for one, state in before.items())
        assert (members.version > version) == (changed or kind == "join")
        before, version = found, members.version


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["join", "report", "leave", "forget", "charge"]),
            st.integers(0, 3),
            st.sampled_from([0.0, 0.01, 0.03, 0.2]),
            st.sampled_from([8, 16]),
        ),
        max_size=30,
    ),
    st.sampled_from([0, 50]),
)
def test_columns_say_what_the_views_say(
    events: list[tuple[str, int, float, int]], reserve: int
) -> None:
    config = LoadConfig(headroom_blocks=reserve)
    members = Members(config, 1)
    now = 0.0
    for number, (kind, which, seconds, size) in enumerate(events):
        now += 0.1
        name = f"i{which}"
        known = name in members.loads
        urgent = RequestClass.INTERACTIVE if size == 8 else RequestClass.STANDARD
        held = sequence(f"s{number}", 10 + number, request_class=urgent)
        if kind == "join":
            model = dataclasses.replace(MODEL, block_size=size)
            members.join(dataclasses.replace(info(name, f"a{number}"), model=model), now)
        elif known and kind == "report":
            life = members.loads[name].info.incarnation
            told = report(name, number, (held,), incarnation=life)
            members.report(dataclasses.replace(told, step_seconds=seconds), now)
        elif known and kind == "leave":
            members.leave(name, members.loads[name].info.incarnation)
        elif known and kind == "charge":
            members.loads[name].charge(held, now)
        elif kind == "forget":
            now += config.forget_after + 1.0
            members.expire(now)
        found = members.candidates(ask("r"), now)
        if found is None:
            continue
        table, views = members.table, list(found)
        sizes = [one.info.model.block_size for one in views]
        headroom = [one.headroom * size for one, size in zip(views, sizes, strict=True)]
        shared = [one.shared_room * size for one, size in zip(views, sizes, strict=True)]
        assert table.block_size[found.rows].tolist() == sizes
        assert table.total[found.rows].tolist() == [one.total for one in views]
        assert table.occupancy[found.rows].tolist() == [one.occupancy for one in views]
        assert table.headroom[found.rows].tolist() == headroom
        assert table.shared_room[found.rows].tolist() == shared
        seconds_each = sorted(block_seconds(one) for one in views)
        assert table.usual_block_seconds(found.rows) == seconds_each[len(views) // 2]
        found.cached = np.arange(len(views))
        for at, one in enumerate(views):
            assert found.missing_on(one.instance_id, 100) == max(1, 100 - at * sizes[at])


def loaded(*reports: LoadReport) -> Dispatcher:
    core = dispatcher()
    for one in reports:
        core.handle(Joined(info(one.instance_id)), 0.0)
        core.handle(Reported(one), 0.0)
    return core


def prompt(request_id: str, uncomputed: int) -> SequenceLoad:
    return sequence(request_id, 100)._replace(uncomputed=uncomputed)


def test_of_equally_free_instances_the_one_with_fewer_prompts_ahead_is_taken() -> None:
    core = loaded(
        report("i0", 1, (prompt("a", 1500),), costs=COSTS),
        report("i1", 1, (prompt("b", 1),), costs=COSTS),
        report("i2", 1, (prompt("c", 800),), costs=COSTS),
    )
    assert placed(core.handle(PlaceRequested(ask("r")), 0.1)) == ["i1"]


def test_a_long_prompt_ahead_outweighs_a_little_freeness_but_not_a_full_memory() -> None:
    fuller = sequence("b", 150)._replace(uncomputed=1)
    core = loaded(
        report("i0", 1, (prompt("a", 1600),), costs=COSTS),
        report("i1", 1, (fuller,), costs=COSTS),
    )
    assert placed(core.handle(PlaceRequested(ask("r")), 0.1)) == ["i1"]
    full = tuple(sequence(f"b{n}", 49)._replace(uncomputed=1) for n in range(20))
    core = loaded(
        report("i0", 1, (prompt("a", 1600),), costs=COSTS), report("i1", 1, full, costs=COSTS)
    )
    assert placed(core.handle(PlaceRequested(ask("r")), 0.1)) == ["i0"]


@given(st.lists(st.floats(0.005, 0.5), min_size=2, max_size=6), st.data())
def test_a_shorter_step_alone_makes_no_instance_look_fuller(
    steps: list[float], data: st.DataObject
) -> None:
    best = data.draw(st.integers(0, len(steps) - 1))
    core = loaded(
        *(
            dataclasses.replace(
                report(f"i{n}", 1, (sequence(f"s{n}", 100 if n == best else 110),)),
                step_seconds=seconds,
            )
            for n, seconds in enumerate(steps)
        )
    )
    assert placed(core.handle(PlaceRequested(ask("r")), 0.1)) == [f"i{best}"]
