"""The bench of goodput: the rate that is found, and what counts as served."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import goodput as bench
from cluster.simulation.records import RequestRecord
from instance.request import RequestClass


@given(
    bound=st.floats(0.05, 300.0),
    first=st.floats(0.5, 4.0),
    precision=st.floats(0.01, 0.5),
)
def test_the_rate_found_is_served_and_little_more_is_not(bound, first, precision) -> None:
    asked = []

    def serves(rate: float) -> bool:
        asked.append(rate)
        return rate <= bound

    found = bench.highest(serves, first, precision)
    assert found in asked
    assert found <= bound <= found * (1 + precision) * (1 + 1e-9)


def test_nothing_is_found_where_nothing_is_served() -> None:
    assert bench.highest(lambda rate: False, 2.0, 0.1) == 0.0


def record(times: list[float], status: str = "finished") -> RequestRecord:
    made = RequestRecord("r", "t", RequestClass.STANDARD, "", 1.0, 10, len(times))
    made.times.extend(times)
    made.status = status
    return made


def test_a_request_is_served_if_both_times_are_met() -> None:
    wanted = bench.Wanted(0.5, 0.1)
    assert wanted.meets(record([1.5]))
    assert wanted.meets(record([1.5, 1.55, 1.7]))
    assert not wanted.meets(record([1.51]))
    assert not wanted.meets(record([1.5, 1.7, 1.71]))
    assert not wanted.meets(record([1.2], "503"))


def test_a_run_finds_a_rate_and_says_where_time_went(tmp_path, monkeypatch) -> None:
    table = tmp_path / bench.WORKLOADS["code"]
    table.write_text("ContextTokens,GeneratedTokens\n" + "400,8\n" * 10)
    monkeypatch.setenv("DROVER_TRACES", str(tmp_path))
    monkeypatch.setitem(bench.SETTINGS, "precision", 1.0)
    bench.wanted.cache_clear()
    found = bench.Run("1P+3D", "code", 1.0, 1, 6.0).execute()
    bench.wanted.cache_clear()
    assert found["rate"] > 0
    assert found["stages"]["prefill"] <= found["wanted"]["ttft"]
    assert found["stages"]["transfer"] > 0


def test_the_verdict_is_on_the_worst_workload() -> None:
    def cell(best: float, changing: float) -> dict[str, dict[str, float]]:
        rates = {name: best / (at + 1) for at, name in enumerate(bench.FIXED)}
        return {name: {"rate": rate} for name, rate in {**rates, bench.CHANGING: changing}.items()}

    cells = {("chat", 1.0): cell(2.0, 2.2), ("code", 1.0): cell(1.0, 0.8)}
    cells["code", 2.0] = cell(1.0, 0.1)
    (target,) = bench.targets_of(cells)
    assert target.measured == pytest.approx(0.8)
    assert not target.holds


def test_the_forms() -> None:
    full = bench.runs_of(False, 50.0)
    assert len({one.file_name for one in full}) == len(full) == 27
    assert len({dataclasses.replace(one, system="") for one in bench.runs_of(True, 1.0)}) == 1
