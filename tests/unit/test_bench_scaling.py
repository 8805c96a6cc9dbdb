"""The bench of scaling: instances over time, and how many do the same service."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest

from bench import scaling as bench
from cluster.dispatcher.events import Tick
from cluster.dispatcher.scaling import START
from cluster.dispatcher.views import InstanceState


def points(
    *runs: tuple[float, float], width: float = 50.0
) -> dict[tuple[float, float], dict[str, float]]:
    """Instances and P99 times to the first token, by band."""
    return {
        (float(at), at + width): {"instances": count, "TTFT P99": time}
        for at, (count, time) in enumerate(runs, 1)
    }


def test_between_two_runs_the_time_falls_by_equal_shares() -> None:
    line = points((4.0, 16.0), (8.0, 1.0))
    assert bench.instances_at(line, 4.0) == pytest.approx(6.0)
    assert bench.instances_at(line, 16.0) == 4.0
    assert bench.instances_at(line, 0.5) == math.inf
    # A run with fewer that does as well is taken first.
    assert bench.instances_at(points((4.0, 16.0), (5.0, 2.0), (8.0, 4.0)), 4.0) < 5.0


def test_bands_of_one_width_make_a_line_and_the_better_one_counts() -> None:
    wide, narrow = points((4.0, 16.0), (8.0, 1.0)), points((3.0, 16.0), (7.0, 1.0), width=20.0)
    assert bench.instances_at({**wide, **narrow}, 4.0) == pytest.approx(5.0)
    # No line leads from one to the other: there would be 4 instances at 4 seconds.
    wide, narrow = points((7.0, 1.0)), points((1.0, 16.0), width=20.0)
    assert bench.instances_at({**wide, **narrow}, 4.0) == 7.0


def test_shares_are_of_one_seed() -> None:
    ours, other = points((3.0, 16.0), (6.0, 1.0)), points((4.0, 16.0), (8.0, 1.0))
    assert bench.shares({1: {bench.OURS: ours, bench.OTHER: other}}, 4.0) == pytest.approx([0.75])
    slow = points((5.0, 16.0), (4.0, 20.0))
    seeds = {1: {bench.OURS: ours, bench.OTHER: slow}, 2: {bench.OURS: slow, bench.OTHER: other}}
    # 4.5 instances where 5 are too few for the other; and one that is never good enough.
    assert bench.shares(seeds, 4.0) == pytest.approx([4.5 / 5.0, math.inf])


def test_the_verdict_is_per_load() -> None:
    seeds = {
        1: {bench.OURS: points((3.0, 9.0), (6.0, 1.0)), bench.OTHER: points((4.0, 9.0), (8.0, 1.0))}
    }
    poisson, bursty = bench.targets_of({"Poisson": seeds, "bursty": seeds})
    assert poisson.measured == bursty.measured == pytest.approx(0.75)
    assert poisson.holds


def test_instances_count_from_their_order_on_within_the_time_that_counts() -> None:
    states = {"a": InstanceState.READY, "b": InstanceState.DRAINING, "c": InstanceState.GONE}
    members = SimpleNamespace(loads=dict.fromkeys(states), state=lambda name, now: states[name])
    scaler = SimpleNamespace(orders=dict, leaving={"b"})
    core: Any = SimpleNamespace(members=members, scaler=scaler)
    fleet = bench.Fleet(10.0, 20.0)
    fleet.after(core, Tick(), [], 8.0)  # 2 instances, one of which leaves
    fleet.after(core, Tick(), [], 14.0)
    scaler.orders = lambda: {"d": START}
    fleet.after(core, Tick(), [], 15.0)
    states["b"] = InstanceState.GONE
    fleet.after(core, Tick(), [], 18.0)  # 3 until here, then 2
    fleet.after(core, Tick(), [], 30.0)
    assert fleet.mean() == pytest.approx((5 * 2 + 3 * 3 + 2 * 2) / 10)
    assert fleet.leaving() == pytest.approx(0.8)
    assert fleet.most == 3


def test_a_run_counts_what_comes_after_its_start() -> None:
    run = bench.Run(bench.OURS, "Poisson", (40.0, 90.0), 20.0, 1, 60, 1.0)
    found = run.execute()
    assert found["complete"]
    figures = found["figures"]
    assert bench.SETTINGS["max_instances"] >= figures["most instances"] >= figures["instances"] > 1
    later = dataclasses.replace(run, warm_up=2.0).execute()["figures"]
    assert later["end to end mean"] != figures["end to end mean"]


def test_the_forms() -> None:
    full = bench.runs_of(False, 2000, 2)
    assert len({one.file_name for one in full}) == len(full)
    assert {one.system for one in bench.runs_of(True, 1, 1)} == set(bench.SYSTEMS)
