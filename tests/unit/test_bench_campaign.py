"""Campaigns of simulated runs: files, names and what is made of results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench import campaign


@dataclass(frozen=True)
class Sum:
    """A run that adds two numbers."""

    one: int
    other: int

    @property
    def file_name(self) -> str:
        return campaign.file_name(("sum", self.one), {}, self)

    def execute(self) -> dict[str, Any]:
        return {"sum": self.one + self.other}


@dataclass(frozen=True)
class Endless:
    """A run that says who executes it, and goes on."""

    folder: str
    file_name = "endless.json"

    def execute(self) -> dict[str, Any]:
        path = Path(self.folder, "pid")
        path.with_suffix(".part").write_text(str(os.getpid()))
        path.with_suffix(".part").replace(path)
        while True:
            time.sleep(0.05)


def test_a_name_depends_on_run_and_settings() -> None:
    names = {
        campaign.file_name(("a b", 7.5), {"kv": kv}, Sum(1, other))
        for kv in (1, 2)
        for other in (1, 2)
    }
    assert len(names) == 4
    assert all(name.startswith("a-b-7.5-") for name in names)


def test_a_run_leaves_one_whole_file(tmp_path: Path) -> None:
    campaign.run_to_file(Sum(1, 2), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [Sum(1, 2).file_name]
    assert json.loads((tmp_path / Sum(1, 2).file_name).read_text()) == {"sum": 3}


def test_results_come_in_the_order_asked_for_and_files_are_not_made_again(tmp_path: Path) -> None:
    runs = [Sum(number, 1) for number in (3, 1, 3)]
    for run in runs:
        (tmp_path / run.file_name).write_text(json.dumps({"sum": -run.one}))
    assert campaign.run_all(runs, tmp_path, 1) == [{"sum": -3}, {"sum": -1}, {"sum": -3}]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_the_bench(tmp_path: Path, number: int) -> None:
    code = (
        "import sys; from pathlib import Path; from bench import campaign;"
        "from tests.unit.test_bench_campaign import Endless;"
        "campaign.run_all([Endless(sys.argv[1])], Path(sys.argv[1]), 1)"
    )
    bench = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    try:
        worker = Path("/proc", eventually((tmp_path / "pid").read_text))
        assert worker.exists()
        bench.send_signal(number)
        assert bench.wait(30) == -number
        eventually(lambda: [] if worker.exists() else [True])
    finally:
        bench.kill()


def eventually(found: Callable[[], Any]) -> Any:
    """What ``found`` returns once it returns something."""
    for _ in range(600):
        try:
            if there := found():
                return there
        except FileNotFoundError:
            pass
        time.sleep(0.05)
    raise AssertionError("not within 30 s")


def test_means_of_ratios_and_where_they_lie() -> None:
    assert campaign.geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    low, high = campaign.interval([0.8, 0.9, 1.0, 0.85])
    assert 0.8 <= low < campaign.geometric_mean([0.8, 0.9, 1.0, 0.85]) < high <= 1.0
    assert campaign.interval([0.7] * 5) == pytest.approx((0.7, 0.7))


def test_medians_are_taken_figure_by_figure() -> None:
    results = [{"a": 1.0, "b": 9.0}, {"a": 3.0, "b": 7.0}, {"a": 2.0, "b": 8.0}]
    assert campaign.medians(results) == {"a": 2.0, "b": 8.0}
