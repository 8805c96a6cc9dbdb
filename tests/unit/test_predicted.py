"""Load in predicted time: what requests lose by memory and by the steps of others."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cluster.dispatcher.load import InstanceLoad, LoadConfig
from cluster.dispatcher.predicted import block_seconds, lost_seconds, memory_seconds
from cluster.dispatcher.rebalance import with_arrival, without
from cluster.dispatcher.views import LoadView
from instance.budget import StepCosts
from tests.unit.dispatching import info, report, sequence

COSTS = StepCosts(0.024, 2e-4, 1e-8, 1e-4, 2.4e-6)


def view_of(running: list[int], waiting: list[int], total: int = 1000) -> LoadView:
    load = InstanceLoad(info("i0", blocks=total), 0.0)
    there = [sequence(f"r{n}", blocks) for n, blocks in enumerate(running)]
    there += [sequence(f"w{n}", blocks, running=False) for n, blocks in enumerate(waiting)]
    load.accept(report("i0", 1, tuple(there), blocks=total, costs=COSTS), 0.0)
    return load.view(0.0, LoadConfig())


@given(
    st.lists(st.floats(-1000.0, 1000.0), min_size=2, max_size=20),
    st.floats(0.01, 5.0),
    st.integers(1, 10_000),
)
def test_more_freeness_never_loses_more(freeness: list[float], seconds: float, total: int) -> None:
    lost = [memory_seconds(one, seconds, total) for one in sorted(freeness)]
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] > 0
    columns = memory_seconds(np.array(sorted(freeness)), seconds, np.full(len(freeness), total))
    assert columns.tolist() == lost


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=12),
    st.lists(st.integers(1, 60), max_size=3),
    st.one_of(st.none(), st.just(COSTS)),
)
def test_a_request_that_leaves_helps_the_others(
    running: list[int], waiting: list[int], costs: StepCosts | None
) -> None:
    view = view_of(running, waiting)
    left = without(view, sequence("r0", running[0]), None)
    assert lost_seconds(left, costs) < lost_seconds(view, costs)
    back = with_arrival(left, sequence("r0", running[0]))
    assert lost_seconds(back, costs) == lost_seconds(view, costs)


def test_steps_count_where_their_costs_are_known() -> None:
    crowded, calm = view_of([10] * 40, []), view_of([10] * 4, [])
    for view in (crowded, calm):
        assert lost_seconds(view, COSTS) > lost_seconds(view, None)
    shared = lost_seconds(crowded, COSTS) - lost_seconds(crowded, None)
    assert shared > 10 * (lost_seconds(calm, COSTS) - lost_seconds(calm, None))


def test_an_unmeasured_step_has_a_usual_duration() -> None:
    view = view_of([10], [])
    assert block_seconds(view) == view.info.model.block_size * 0.01
    assert block_seconds(view._replace(step_seconds=0.0)) > 0
