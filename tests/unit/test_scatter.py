"""How unevenly a device works: what a law may be, and when steps end under it."""

from __future__ import annotations

import itertools
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.simulation.scatter import Pace, Scatter

quick = settings(max_examples=60, deadline=None)


@st.composite
def scatters(draw: st.DrawFn) -> Scatter:
    drawn = draw(st.lists(st.floats(0.2, 5.0), min_size=1, max_size=12))
    return Scatter(tuple(one / fmean(drawn) for one in drawn), draw(st.floats(0.002, 5.0)))


@pytest.mark.parametrize(
    ("speeds", "spell", "wrong"),
    [
        ((), 1.0, "speeds"),
        ((0.0, 2.0), 1.0, "speeds"),
        ((float("nan"),), 1.0, "speeds"),
        ((float("inf"),), 1.0, "speeds"),
        ((0.5, 1.0), 1.0, "mean is 0.75"),
        ((1.0,), 0.0, "spell"),
        ((1.0,), float("inf"), "spell"),
    ],
)
def test_laws_that_make_no_sense(speeds: tuple[float, ...], spell: float, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        Scatter(speeds, spell)


@quick
@given(scatters(), st.integers(0, 9), st.lists(st.floats(0, 3.0), max_size=30), st.floats(0, 1e4))
def test_steps_do_as_much_as_time_and_speeds_allow(
    scatter: Scatter, seed: int, durations: list[float], began: float
) -> None:
    """A step's work is the integral of the speed over the time that it takes."""
    pace = Pace(scatter, seed, "instance-0")
    for seconds in durations:
        end = pace.end(began, seconds)
        assert end >= began
        assert seconds / max(scatter.speeds) <= end - began + 1e-9
        assert end - began <= seconds / min(scatter.speeds) + 1e-9
        first, last = int(began / scatter.spell), int(end / scatter.spell)
        borders = [began, *(k * scatter.spell for k in range(first + 1, last + 1)), end]
        done = sum(
            (two - one) * pace.speed(first + number)
            for number, (one, two) in enumerate(itertools.pairwise(borders))
        )
        assert done == pytest.approx(seconds, abs=1e-7)
        began = end


@quick
@given(scatters(), st.integers(0, 9), st.floats(0, 100), st.floats(0, 3), st.floats(0, 3))
def test_two_steps_in_a_row_take_what_one_of_both_does(
    scatter: Scatter, seed: int, began: float, one: float, two: float
) -> None:
    pace = Pace(scatter, seed, "instance-0")
    assert pace.end(pace.end(began, one), two) == pytest.approx(pace.end(began, one + two))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9))
def test_each_speed_has_its_share(weights: list[int]) -> None:
    """Over many spells the mean speed is 1, so long work takes what the formula says."""
    speeds = tuple(one / fmean(weights) for one in weights)
    pace = Pace(Scatter(speeds, 0.5), 3, "instance-0")
    drawn = [pace.speed(spell) for spell in range(20_000)]
    assert set(drawn) == set(speeds)
    assert fmean(drawn) == pytest.approx(1.0, rel=0.1)


def test_devices_and_seeds_have_spells_of_their_own() -> None:
    scatter = Scatter((0.5, 0.75, 1.25, 1.5), 0.1)

    def drawn(seed: int, name: str) -> list[float]:
        pace = Pace(scatter, seed, name)
        return [pace.speed(spell) for spell in range(64)]

    assert drawn(0, "a") == drawn(0, "a")
    assert len({tuple(drawn(seed, name)) for seed in (0, 1) for name in ("a", "b")}) == 4
