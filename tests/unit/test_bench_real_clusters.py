"""The benches of real clusters: what they ask, how runs resume, and their arithmetic."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import rebalance, simulation_fidelity
from bench.served_cluster import take, total
from cluster.admin_client import AdminClient
from cluster.simulation.profile_files import format_profile, load_profile


def test_runs_that_have_a_file_are_not_repeated(tmp_path: Path) -> None:
    started: list[int] = []
    done: list[str] = []

    @contextlib.contextmanager
    def cluster() -> Iterator[AdminClient]:
        started.append(1)
        yield AdminClient("http://127.0.0.1:9", "")

    def run(name: str, admin: AdminClient) -> dict[str, Any]:
        done.append(name)
        return {"name": name}

    names = ["a.json", "b.json", "c.json"]
    assert take(names, tmp_path / "runs", 2, cluster, run) == 1
    assert done == names[:2]
    assert take(names, tmp_path / "runs", 2, cluster, run) == 0
    assert done == names
    assert take(names, tmp_path / "runs", 2, cluster, run) == 0
    assert len(started) == 2
    assert json.loads((tmp_path / "runs" / "c.json").read_text()) == {"name": "c.json"}


def test_a_run_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def run(name: str, admin: AdminClient) -> dict[str, Any]:
        raise RuntimeError("it died")

    with pytest.raises(RuntimeError, match="it died"):
        take(["a.json"], tmp_path, 0, lambda: contextlib.nullcontext(AdminClient("", "")), run)
    assert list(tmp_path.iterdir()) == []


def test_a_metric_is_summed_over_its_labels() -> None:
    text = (
        "# TYPE vllm:num_preemptions_total counter\n"
        'vllm:num_preemptions_total{engine="0"} 3.0\n'
        'vllm:num_preemptions_total{engine="1"} 4.0\n'
        "# TYPE other gauge\nother 9.0\n"
    )
    assert total(text, "vllm:num_preemptions_total") == 7.0
    assert total(text, "none") == 0.0


# ---- rebalance


def test_every_other_request_is_long() -> None:
    requests = rebalance.workload(3, 50.0, 2.0)
    assert len(requests) == 100
    assert [one.arrival for one in requests] == sorted(one.arrival for one in requests)
    lengths = [(one.prompt_tokens, one.output_tokens) for one in requests]
    assert set(lengths[::2]) == {rebalance.LONG}
    assert set(lengths[1::2]) == {rebalance.SHORT}
    assert rebalance.workload(4, 50.0, 2.0) != requests


def test_each_side_comes_first_in_turn() -> None:
    names = rebalance.names_of(3, quick=False, modelled=False)
    assert [name.split("-")[1:] for name in names] == [
        ["0", "off.json"], ["0", "on.json"],
        ["1", "on.json"], ["1", "off.json"],
        ["2", "off.json"], ["2", "on.json"],
    ]  # fmt: skip
    others = [(True, False), (False, True), (True, True)]
    kinds = [rebalance.names_of(3, quick, modelled) for quick, modelled in others]
    assert len({*names, *(name for kind in kinds for name in kind)}) == 4 * len(names)


def result(pair: int, side: str, p99: float, preemptions: float, failed: int = 0) -> dict[str, Any]:
    figures = dict.fromkeys(rebalance.FIGURES, 1.0)
    return {
        **figures,
        "pair": pair,
        "side": side,
        "p99_ttft_ms": p99,
        "preemptions": preemptions,
        "failed": failed,
        "moves": {"balance": 2},
    }


def test_the_verdict_is_on_the_median_pair() -> None:
    good = [
        result(0, "on", 60.0, 1), result(0, "off", 100.0, 4),
        result(1, "off", 10.0, 3), result(1, "on", 7.0, 3),
        result(2, "on", 900.0, 8), result(2, "off", 100.0, 4),
    ]  # fmt: skip
    assert rebalance.ratio(good, "p99_ttft_ms") == 0.7
    assert [one.holds for one in rebalance.targets_of(good)] == [True, True, True]
    worse = [*good, result(3, "on", 90.0, 9, failed=1), result(3, "off", 100.0, 4)]
    assert [one.holds for one in rebalance.targets_of(worse)] == [False, False, False]
    # Half a pair says nothing.
    assert rebalance.pairs_of([*good, result(4, "on", 0.1, 0)]) == rebalance.pairs_of(good)
    assert rebalance.table(good)[0][-1] == "balance 2"


# ---- simulation_fidelity


def real(factor: float) -> dict[str, float]:
    return {name: factor * (number + 1) for number, name in enumerate(simulation_fidelity.FIGURES)}


def test_a_percentile_may_be_off_by_what_real_runs_differ_by() -> None:
    rows = simulation_fidelity.rows_of(
        [real(90.0), real(100.0), real(115.0)], [real(120.0), real(118.0), real(112.0)]
    )
    by = {row["figure"]: row for row in rows}
    assert by["TTFT mean"]["simulated_spread"] == pytest.approx(8 / 118)
    assert by["TTFT mean"]["off"] == pytest.approx(0.18)
    assert by["TTFT mean"]["spread"] == pytest.approx(0.25)
    holds = {one.name: one.holds for one in simulation_fidelity.targets_of(rows)}
    assert holds == {
        "TTFT mean off by": False,
        "TPOT mean off by": False,
        "tokens/s off by": False,
        "TTFT P99 off by": True,
        "TPOT P99 off by": True,
    }
    alike = simulation_fidelity.rows_of([real(100.0)] * 3, [real(92.0)])
    assert all(one.holds for one in simulation_fidelity.targets_of(alike))
    assert {row["may_be"] for row in alike} == {0.10, 0.15}


def test_the_simulation_is_that_of_the_command(tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text(format_profile(load_profile("llama-8b-a10")))
    found, again = simulation_fidelity.simulated(path, simulation_fidelity.QUICK_WORKLOAD, 2)
    # Without scatter a seed only makes other words.
    assert found == again
    assert set(found) == set(simulation_fidelity.FIGURES)
    # A step of this profile takes 27 ms at least, and figures are in milliseconds.
    assert 27 < found["TPOT mean"] < 100
    assert found["TTFT mean"] <= found["TTFT P99"]
