"""The bench of fairness over a cluster: what its systems do, and what it makes of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bench.cluster_fairness import Run, requests, rotated, targets_of
from bench.fair_cluster_runs import DROVER, FCFS, OWN, STILL, Setting, System, run
from cluster.simulation.profile_files import load_profile
from cluster.simulation.workloads.records import Span, WorkloadRequest
from instance.config import SchedulerConfig

SECONDS = 12.0
SETTING = Setting(
    dataclasses.replace(load_profile("llama-7b-a10"), num_blocks=120),
    theta=500.0,
    seconds=SECONDS,
    scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=256, priority_interval=2),
)


def asked(instances: int) -> list[WorkloadRequest]:
    """Tenant a asks for half of what b does, and both for more than there is."""
    rate = 12 * instances
    return [
        WorkloadRequest(number / rate, (Span(f"r{number}", 96),), 64, "a" if number % 3 else "b")
        for number in range(int(rate * SECONDS))
    ]


@pytest.mark.parametrize("system", [DROVER, FCFS, STILL], ids=lambda one: one.name)
def test_a_pinned_tenant_has_its_share_only_where_requests_move(system: System) -> None:
    result = run(system, SETTING, 3, asked(3), pinned="b")
    moved = result["migrations"].get("fairness", 0)
    if system is DROVER:
        assert moved > 10
        assert result["received"]["b"] == pytest.approx(0.5, abs=0.06)
        assert result["over_bound_max"] <= 1
    else:
        assert moved == 0
        assert result["received"]["b"] < 0.4
    assert sum(result["received"].values()) == pytest.approx(1.0)


def test_random_moves_leave_the_shares_as_they_are() -> None:
    result = run(DROVER, SETTING, 2, asked(2), migrate=0.3)
    assert result["migrations"]["admin"] > 10
    assert result["received"]["b"] == pytest.approx(0.5, abs=0.06)
    assert result["over_bound_max"] <= 1


def test_only_the_blind_serve_as_tenants_ask() -> None:
    blind = run(FCFS, SETTING, 2, asked(2))["received"]
    fair = run(OWN, SETTING, 2, asked(2))["received"]
    assert blind["b"] < 0.42 < 0.44 < fair["b"]


def test_copies_of_a_trace_begin_elsewhere_and_ask_as_much() -> None:
    trace = [WorkloadRequest(float(n), (Span(f"r{n}", 5),), 1, f"t{n}") for n in range(11)]
    found = rotated(trace, 2, 10.0)
    assert len(found) == 20 + 2
    assert [one.tenant for one in found if one.arrival == 0.0].count("t5") == 1
    assert len({one.prompt for one in found}) == len(found)


def test_loads_grow_with_the_cluster() -> None:
    for load in ("overloaded", "skewed"):
        one, four = (len(requests(load, number, 100.0, 0)) for number in (1, 4))
        assert four == pytest.approx(4 * one, rel=0.15)


def test_the_verdict_is_on_the_worst_run() -> None:
    def result(load: str, instances: int, share: float, over: float) -> dict[str, Any]:
        made = Run(load, instances, DROVER.name, 1.0)
        return {
            "run": dataclasses.asdict(made),
            "received": {"tenant-1": share},
            "over_bound_max": over,
        }

    good = [result("overloaded", 4, 0.5, 0.2), result("pinned", 4, 0.46, 1.0)]
    assert [one.holds for one in targets_of(good)] == [True, True]
    bad = [*good, result("overloaded", 16, 0.5, 1.1), result("pinned", 16, 0.44, 0.3)]
    assert [one.holds for one in targets_of(bad)] == [False, False]
    theirs = result("pinned", 4, 0.1, 9.0)
    theirs["run"]["system"] = FCFS.name
    assert [one.holds for one in targets_of([*good, theirs])] == [True, True]
