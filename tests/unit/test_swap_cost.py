"""What the cost model learns from, and what it answers."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from instance.budget import StepCostLearner, StepShape, attended
from instance.fit import Fit
from instance.kv.cost import MIB, SwapCost, waiting_pays
from instance.request import Row
from tests.unit.kv_driver import make

SEQUENCE = make("r", [1])

jobs = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 400)), min_size=20, max_size=60)


@given(
    jobs=jobs,
    launch=st.floats(1e-6, 1e-3),
    rate=st.floats(1e8, 1e11),
)
def test_the_cost_of_a_launch_and_the_rate_are_found(
    jobs: list[tuple[int, int]], launch: float, rate: float
) -> None:
    cost = SwapCost(MIB // 4, 16, StepCostLearner())
    # What lies on one line cannot tell the two apart.
    jobs = [*jobs, (1, 400), (20, 20), (1, 1)]

    def truth(runs: int, blocks: int) -> float:
        return runs * launch + blocks * cost.block_bytes / rate

    for runs, blocks in jobs:
        cost.observe_copy(True, runs, blocks, truth(runs, blocks))
    for runs, blocks in jobs:
        assert math.isclose(cost.copy_seconds(True, runs, blocks), truth(runs, blocks), rel_tol=0.1)
    # Until something was measured the other way, this is the best guess.
    assert cost.copy_seconds(False, 3, 5) == cost.copy_seconds(True, 3, 5)
    for _ in range(200):
        cost.observe_copy(False, 3, 5, 1.0)
    assert math.isclose(cost.copy_seconds(False, 3, 5), 1.0, rel_tol=0.01)
    runs, blocks = jobs[-1]
    assert math.isclose(cost.copy_seconds(True, runs, blocks), truth(runs, blocks), rel_tol=0.1)


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9), st.floats(0, 10)), min_size=1, max_size=40
    )
)
def test_a_fit_is_never_negative_nor_undefined(seen: list[tuple[int, int, float]]) -> None:
    fit = Fit((1e-3, 2.0), 0.9)
    for one, other, seconds in seen:
        fit.observe((one, other), seconds)
        assert all(cost >= 0 and math.isfinite(cost) for cost in fit.costs)
        assert fit.seconds((3, 4)) >= 0


def test_new_measurements_displace_old_ones() -> None:
    fit = Fit((1.0,), 0.8)
    for _ in range(50):
        fit.observe((2,), 2.0)
    assert math.isclose(fit.seconds((1,)), 1.0, rel_tol=0.01)
    for _ in range(50):
        fit.observe((2,), 6.0)
    assert math.isclose(fit.seconds((1,)), 3.0, rel_tol=0.01)


def test_prefill_is_told_apart_from_decodes_beside_it() -> None:
    steps = StepCostLearner()
    cost = SwapCost(MIB, 16, steps)
    token, pair, decode, base = 3e-4, 2e-8, 1e-3, 5e-3
    for step in range(400):
        decodes = step % 7
        chunk = (0, 64, 256)[step % 3]
        pairs = attended(128 * (step % 5), chunk)
        seconds = base + decode * decodes + token * chunk + pair * pairs
        steps.observe(StepShape(chunk, pairs, decodes, 51 * decodes), seconds)
    expected = 1000 * token + attended(0, 1000) * pair
    assert math.isclose(cost.prefill_seconds(0, 1000), expected, rel_tol=0.15)
    # What is farther back costs more, by the quadratic part.
    assert cost.prefill_seconds(4000, 5000) > cost.prefill_seconds(0, 1000)


def test_the_service_of_a_swap_is_its_time_at_the_rate_of_service() -> None:
    cost = SwapCost(MIB, 16, StepCostLearner())
    assert cost.swap_service(1000) == 0.0
    for _ in range(100):
        cost.observe_step([Row(SEQUENCE, 9, 1, True)] * 10, 0.02)
        cost.observe_copy(True, 1, 64, 0.064)
        cost.observe_copy(False, 1, 64, 0.128)
    assert math.isclose(cost.service_rate, 1000.0, rel_tol=1e-6)
    # 63 blocks, a millisecond each out and two back; a launch is a small part of it.
    assert math.isclose(cost.swap_service(1000), 63 * 3e-3 * 1000, rel_tol=0.05)


def test_rates_are_those_of_the_copies() -> None:
    cost = SwapCost(MIB, 16, StepCostLearner())
    for blocks in (1, 10, 100, 3, 30, 300):
        cost.observe_copy(True, 1, blocks, blocks * MIB / 1e9)
        cost.observe_copy(False, 1, blocks, blocks * MIB / 2e9)
    out, inward = cost.copy_rates
    assert math.isclose(out, 1e9, rel_tol=0.01)
    assert math.isclose(inward, 2e9, rel_tol=0.01)


def test_waiting_for_a_copy_pays_where_it_is_short_and_little_could_run() -> None:
    assert waiting_pays(left=0.001, step=0.05, runnable=1, blocked=1)
    assert waiting_pays(left=0.001, step=0.05, runnable=0, blocked=1)
    assert not waiting_pays(left=0.001, step=0.05, runnable=63, blocked=1)
    # A copy as long as a step is worth no wait: what it blocks is in time for the next one.
    assert not waiting_pays(left=0.05, step=0.05, runnable=1, blocked=8)
    assert not waiting_pays(left=0.2, step=0.05, runnable=4, blocked=1)
    assert not waiting_pays(left=0.2, step=0.0, runnable=1, blocked=9)
