"""The sides of the engine bench make as many tokens as they are asked for."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import engine_throughput
from bench.engine_sides import CONTINUOUS, Workload, make_side, warm_up
from bench.engine_throughput import targets
from tests.integration.models import make_tiny_model

WORKLOAD = Workload("mixed", [[40 + i] * (3 + 5 * i) for i in range(4)], [2, 9, 5, 7])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["drover", "padded_dynamic", "padded_static", *CONTINUOUS])
def test_a_side_runs(name: str, tmp_path: Path) -> None:
    """Each raises if it makes fewer or more tokens."""
    folder = make_tiny_model(tmp_path, "llama", dtype="bfloat16", layers=2, max_len=128)
    run = make_side(name, str(folder), 1)
    assert warm_up(WORKLOAD).outputs == [2, 4, 4, 4]
    for workload in (warm_up(WORKLOAD), WORKLOAD):
        result = run(workload)
        assert result["seconds"] > 0
    if name == "drover":
        # One step for the first tokens, then one for each further token of the longest.
        assert result["steps"] == max(WORKLOAD.outputs)
        assert 0 < result["outside_model"] < 1


def test_verdict() -> None:
    def row(side: str, workload: str, rate: float) -> dict[str, object]:
        return {
            "side": side,
            "workload": workload,
            "tokens_per_second": rate,
            "outside_model": 0.05,
        }

    rows = [
        row("drover", "equal", 300.0),
        row("drover", "sampled", 200.0),
        row("drover", "mixed", 300.0),
        row("padded_dynamic", "equal", 100.0),
        row("padded_static", "equal", 200.0),
        row("padded_dynamic", "mixed", 50.0),
        row("padded_static", "mixed", 60.0),
        row("continuous_large", "mixed", 100.0),
        row("vllm", "equal", 400.0),
        row("vllm", "mixed", 300.0),
    ]
    found = [(target.measured, target.holds) for target in targets(rows)]
    assert found == [
        (1.5, True),
        (3.0, True),
        (3.0, True),
        (0.05, True),
        (0.05, True),
        (0.75, False),
        (1.0, True),
    ]


def test_a_run_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last part counts what all have measured."""
    ran: list[str] = []

    def run_side(
        name: str, folder: Path, threads: int, workloads: list[Workload]
    ) -> tuple[list[dict[str, Any]], str]:
        ran.append(name)
        seconds = float(len(ran))
        return [{"workload": one.name, "seconds": seconds} for one in workloads], "1.0"

    monkeypatch.setattr(engine_throughput, "run_side", run_side)
    monkeypatch.setattr(engine_throughput, "resolve_model", lambda name: tmp_path)
    monkeypatch.setattr(engine_throughput, "mixed_lengths", lambda requests: WORKLOAD)
    monkeypatch.delenv("DROVER_VLLM_PYTHON", raising=False)

    def part(sides: str | None, rounds: int) -> dict[tuple[str, str], list[float]]:
        options = argparse.Namespace(
            model="m", threads=1, quick=False, rounds=rounds, sides=sides,
            samples=tmp_path / "samples",
        )  # fmt: skip
        rows = engine_throughput.run(options)["rows"]
        return {(row["side"], row["workload"]): row["seconds"] for row in rows}

    first = part("drover,padded_static", 2)
    assert ran == ["drover", "padded_static", "padded_static", "drover"]
    assert first["drover", "equal"] == first["drover", "sampled"] == [1.0, 4.0]
    second = part("padded_dynamic", 1)
    assert second == {
        **first,
        ("padded_dynamic", "equal"): [5.0],
        ("padded_dynamic", "mixed"): [5.0],
    }
    assert part(None, 0) == second
