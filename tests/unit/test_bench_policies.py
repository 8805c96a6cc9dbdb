"""The bench of policies: its runs, the cells that count, and ratios of ours over theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import campaign
from bench import llumnix_policies as bench


def run(policy: str, seed: int = 1, share: float = 0.8, workload: str = "m-m") -> bench.Run:
    return bench.Run(workload, share, policy, seed, 6, 1, 3.0 * (policy == "Llumnix"))


def result(one: bench.Run, **figures: float) -> dict[str, Any]:
    return {
        "run": {
            "workload": one.workload,
            "share": one.share,
            "policy": one.policy,
            "seed": one.seed,
            "threshold": one.threshold,
        },
        "figures": dict.fromkeys(bench.FIGURES, 1.0) | figures,
    }


def test_each_run_has_a_file_of_its_own() -> None:
    runs = [
        run(policy, seed, share)
        for policy in bench.POLICIES
        for seed in (1, 2)
        for share in (0.5, 0.9)
    ]
    runs.append(bench.Run("m-m", 0.5, "Llumnix", 1, 6, 1, 10.0))
    assert len({one.file_name for one in runs}) == len(runs)


def test_a_run_gives_every_figure(tmp_path: Path) -> None:
    for policy in bench.POLICIES:
        campaign.run_to_file(run(policy), tmp_path)
        found = json.loads((tmp_path / run(policy).file_name).read_text())
        assert set(found["figures"]) == set(bench.FIGURES)
        assert found["complete"]
        assert found["lost_tokens"] == 0


def test_the_saturating_rate_grows_with_the_cluster_and_falls_with_lengths() -> None:
    assert bench.saturating_rate("m-m", 8) == pytest.approx(2 * bench.saturating_rate("m-m", 4))
    short, medium, long = (bench.saturating_rate(one, 16) for one in ("s-s", "m-m", "l-l"))
    assert short > medium > long
    # The published experiment went up to these rates.
    assert 32 < short < 60
    assert 6 < medium < 12
    assert 2.5 < long < 5


def test_only_cells_count_in_which_the_baseline_waits() -> None:
    results = [
        result(run("INFaaS++", seed, share), **{"TTFT P99": tail})
        for share, tail in ((0.75, 2.9), (0.95, 3.1))
        for seed in (1, 2, 3)
    ]
    assert list(bench.loaded(bench.cells_of(results), {"m-m": 1.0})) == [("m-m", 0.95)]


def test_ratios_are_paired_by_seed_and_averaged_by_workload() -> None:
    results = [
        result(run(policy, seed, workload=workload), **{"TTFT P99": value * seed})
        for workload, values in (
            ("m-m", {"ours": 1.0, "Llumnix": 2.0}),
            ("s-s", {"ours": 8.0, "Llumnix": 1.0}),
        )
        for policy, value in values.items()
        for seed in (1, 2, 3)
    ]
    results.append(result(run("ours", 4), **{"TTFT P99": 100.0}))
    cells = bench.cells_of(results)
    found = bench.ratios(cells, "TTFT P99", "ours", "Llumnix")
    assert found == {"m-m": [0.5] * 3, "s-s": [8.0] * 3}
    assert bench.overall(found) == pytest.approx(2.0)
    assert bench.worst(found) == pytest.approx(8.0)
    assert bench.best_cell(cells, "TTFT P99", "ours", "Llumnix") == pytest.approx(0.5)
    assert bench.kept(cells, "TTFT P99", "ours", "Llumnix") == pytest.approx((26.5 / 4 + 8) / 2)


def test_the_threshold_of_a_sweep_is_the_one_with_the_shortest_tail(
    capsys: pytest.CaptureFixture[str],
) -> None:
    results = [
        result(bench.Run("m-m", 0.8, "Llumnix", 1, 6, 1, one), **{"TTFT P99": abs(one - 9.0)})
        for one in bench.THRESHOLDS
    ]
    bench.show_sweep(results)
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == "10"


def test_the_quick_form_is_a_part_of_the_same_experiment() -> None:
    given = type("Given", (), {"quick": True})()
    assert {one.policy for one in bench.runs_of(given)} == set(bench.POLICIES)


def test_only_cells_that_count_are_run_on_more_than_the_first_seeds() -> None:
    given = type("Given", (), {})()
    given.quick, given.sweep, given.form, given.seeds = False, False, "development", 5
    given.workloads, given.shares = ["s-s", "m-m"], [0.75, 0.95]
    first, more = bench.runs_of(given), bench.more_runs(given, [("m-m", 0.95)])
    assert len(first) == 4 * len(bench.POLICIES) * bench.FIRST_SEEDS
    assert {one.seed for one in more} == {4, 5}
    assert {(one.workload, one.share) for one in more} == {("m-m", 0.95)}
    assert {one.policy for one in more} == {"INFaaS++", "Llumnix", "ours"}
    given.seeds = 2
    assert {one.seed for one in bench.runs_of(given)} == {1, 2}
    assert not bench.more_runs(given, [("m-m", 0.95)])
