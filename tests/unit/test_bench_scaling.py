"""The bench of scaling: instances over time, and how many do the same service."""

from __future__ import annotations

import math

import pytest

from bench import scaling as bench


def points(*runs: tuple[float, float]) -> dict[float, dict[str, float]]:
    """Instances and P99 times to the first token, by edge."""
    return {
        float(at): {"instances": count, "TTFT P99": time}
        for at, (count, time) in enumerate(runs, 1)
    }


def test_between_two_runs_the_time_falls_by_equal_shares() -> None:
    line = points((4.0, 16.0), (8.0, 1.0))
    assert bench.instances_at(line, 4.0) == pytest.approx(6.0)
    assert bench.instances_at(line, 16.0) == 4.0
    assert bench.instances_at(line, 0.5) == math.inf
    # A run with fewer that does as well is taken first.
    assert bench.instances_at(points((4.0, 16.0), (5.0, 2.0), (8.0, 4.0)), 4.0) < 5.0


def test_the_share_is_over_what_both_reach() -> None:
    ours, other = points((3.0, 16.0), (6.0, 1.0)), points((4.0, 16.0), (8.0, 1.0))
    assert bench.shares(ours, other) == pytest.approx([0.75] * bench.LEVELS)
    better = points((3.0, 0.5), (6.0, 0.25))
    assert bench.shares(better, other) == pytest.approx([3.0 / 8.0] * bench.LEVELS)


def test_the_verdict_is_per_load() -> None:
    systems = {
        bench.OURS: points((3.0, 16.0), (6.0, 1.0)),
        bench.OTHER: points((4.0, 16.0), (8.0, 1.0)),
    }
    poisson, bursty = bench.targets_of({"Poisson": systems, "bursty": systems})
    assert poisson.measured == bursty.measured == pytest.approx(0.75)
    assert poisson.holds


def test_a_run_counts_instances_from_their_order_on() -> None:
    found = bench.Run(bench.OURS, "Poisson", 40.0, 20.0, 1, 60).execute()
    assert found["complete"]
    figures = found["figures"]
    assert bench.SETTINGS["max_instances"] >= figures["most instances"] >= figures["instances"] > 1


def test_the_forms() -> None:
    full = bench.runs_of(False, 2000, 2)
    assert len({one.file_name for one in full}) == len(full)
    assert {one.system for one in bench.runs_of(True, 1, 1)} == set(bench.SYSTEMS)
