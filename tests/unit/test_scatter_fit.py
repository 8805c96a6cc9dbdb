"""Scatter fitted to work: what made the work comes out again."""

from __future__ import annotations

import dataclasses
import random
from statistics import fmean, pstdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.simulation.mixed_load import Limits, Simulated, Times, contended, fitted, mixed_load
from cluster.simulation.scatter import Pace, Scatter
from cluster.simulation.scatter_fit import Work, fit_scatter, shown_by
from tests.unit.simulating import profile

LAW = Scatter((0.6, 0.75, 0.83, 0.9, 0.96, 1.02, 1.09, 1.16, 1.26, 1.43), 0.4)


def paced(scatter: Scatter, first: float, second: float, count: int) -> list[tuple[Work, Work]]:
    """Two pieces of work in a row, at random times."""
    pace, rng = Pace(scatter, 7, "instance-0"), random.Random(2)
    made = []
    for _ in range(count):
        began = rng.uniform(0.0, 1e4)
        border = pace.end(began, first)
        made.append((Work(border - began, first), Work(pace.end(border, second) - border, second)))
    return made


@pytest.mark.parametrize("spell", [0.1, 0.4, 1.5])
def test_a_fit_finds_what_made_the_work(spell: float) -> None:
    found = fit_scatter(paced(Scatter(LAW.speeds, spell), 0.1, 0.7, 3000))
    assert found is not None
    assert pstdev(found.speeds) == pytest.approx(pstdev(LAW.speeds), rel=0.2)
    assert spell / 2 < found.spell < 2 * spell


def test_a_simulated_load_tells_of_its_scatter() -> None:
    """As ``drover calibrate --url`` does it, with a simulation in the cluster's place."""
    device = profile(400)
    load = Simulated(mixed_load(device, 2, 60), device, Limits(2, 32))
    seen = load.times(LAW, seed=99)
    assert seen != load.times(LAW, seed=0)
    found = fitted(seen, load, 0.0)
    assert found is not None
    assert pstdev(found.speeds) == pytest.approx(pstdev(LAW.speeds), rel=0.4)
    assert LAW.spell / 4 < found.spell < 4 * LAW.spell
    assert fitted(load.times(None), load, 0.0) is None


@pytest.mark.parametrize("scatter", [None, LAW])
@pytest.mark.parametrize("contention", [0.0, 0.08])
def test_by_how_much_requests_delay_each_other_shows_in_a_load(
    scatter: Scatter | None, contention: float
) -> None:
    device, limits = dataclasses.replace(profile(400), scatter=scatter), Limits(2, 32)
    asked = mixed_load(device, 2, 120)
    busy = Simulated(asked, dataclasses.replace(device, contention=contention), limits)
    seen = busy.times(scatter, seed=99)
    stalled = [*seen[:-2], *(Times(one.first + 5.0, one.rest) for one in seen[-2:])]
    for times in (seen, stalled):
        assert contended(times, asked, device, limits) == pytest.approx(contention, abs=0.02)


def test_a_law_is_corrected_by_what_it_shows() -> None:
    """A simulation that shows twice the spread, and half the spell, of the law it has."""

    def shown(law: Scatter) -> Scatter:
        return Scatter(tuple(1.0 + 2.0 * (speed - 1.0) for speed in law.speeds), law.spell / 2)

    measured = Scatter((0.8, 1.0, 1.2), 0.3)
    found = shown_by(measured, shown)
    assert found.speeds == pytest.approx((0.9, 1.0, 1.1))
    assert found.spell == pytest.approx(0.6)
    assert shown_by(measured, lambda law: None) == measured


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(1e-4, 10), st.floats(1e-4, 10)), min_size=10, max_size=60))
def test_whatever_is_measured_makes_a_law(measured: list[tuple[float, float]]) -> None:
    work = [Work(*one) for one in measured]
    found = fit_scatter(list(zip(work, work[::-1], strict=True)))
    if found is not None:
        assert fmean(found.speeds) == pytest.approx(1.0)
        assert list(found.speeds) == sorted(found.speeds)


def test_of_little_work_nothing_is_told() -> None:
    assert fit_scatter([(Work(1.0, 1.0), Work(1.0, 2.0)), (Work(2.0, 1.0), Work(1.0, 1.0))]) is None
    assert fit_scatter([(Work(0.5, 1.0), Work(0.4, 1.0))] * 20) is None


@pytest.mark.parametrize("instances", [1, 4])
def test_a_mixed_load_keeps_instances_busy_and_fits_them(instances: int) -> None:
    small = profile(16)
    asked = mixed_load(small, instances, 200)
    longest = max(one.prompt_tokens + one.output_tokens for one in asked)
    assert longest <= min(small.model.max_model_len, 16 * small.model.block_size)
    seconds = small.step.of(0, 0, 1, 0) * fmean(one.output_tokens for one in asked)
    running = seconds * len(asked) / asked[-1].arrival / instances
    assert 0.3 < running < 1.2
