"""The bench of policies: runs that are there are not run again, and ratios are ours over theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import campaign
from bench import llumnix_policies as bench


def result(run: bench.Run, **figures: float) -> dict[str, Any]:
    return {
        "run": {"workload": run.workload, "rate": run.rate, "policy": run.policy},
        "figures": dict.fromkeys(bench.FIGURES, 1.0) | figures,
    }


def run(policy: str, seed: int = 1, rate: float = 8.0) -> bench.Run:
    return bench.Run("llumnix-m-m", rate, policy, seed, 6, 1)


def test_each_run_has_a_file_of_its_own() -> None:
    runs = [
        run(policy, seed, rate) for policy in bench.POLICIES for seed in (1, 2) for rate in (1, 2)
    ]
    assert len({one.file_name for one in runs}) == len(runs)


def test_a_run_that_is_there_is_read(tmp_path: Path) -> None:
    runs = [run(policy) for policy in bench.POLICIES]
    for number, one in enumerate(runs):
        (tmp_path / one.file_name).write_text(json.dumps({"number": number}))
    assert campaign.run_all(runs, tmp_path, 1) == [{"number": number} for number in range(4)]


def test_a_run_gives_every_figure(tmp_path: Path) -> None:
    for policy in bench.POLICIES:
        campaign.run_to_file(run(policy), tmp_path)
        found = json.loads((tmp_path / run(policy).file_name).read_text())
        assert set(found["figures"]) == set(bench.FIGURES)
        assert found["complete"]
        assert found["lost_tokens"] == 0


def test_cells_are_medians_and_ratios_geometric_means() -> None:
    results = [
        result(run(policy, seed, rate), **{"TTFT P99": value * seed})
        for rate, values in (
            (8.0, {"ours": 1.0, "Llumnix": 2.0}),
            (9.0, {"ours": 8.0, "Llumnix": 1.0}),
        )
        for policy, value in values.items()
        for seed in (1, 2, 3)
    ]
    cells = bench.cells_of(results)
    assert cells["llumnix-m-m", 8.0]["ours"]["TTFT P99"] == 2.0
    assert bench.ratio(cells, "TTFT P99", "Llumnix") == pytest.approx(2.0)
    assert bench.share(cells, "TTFT P99", "Llumnix") == pytest.approx(18 / 6)


def test_the_quick_form_is_a_part_of_the_same_experiment() -> None:
    given = type("Given", (), {"quick": True})()
    assert {one.policy for one in bench.runs_of(given)} == set(bench.POLICIES)
