"""The systems of the context-switch bench with a real model: other copies, the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.switch_cpu import run_cpu
from bench.switch_runs import Load
from bench.switch_systems import SYSTEMS
from cluster.simulation.workloads.records import Span, WorkloadRequest
from tests.integration.models import make_tiny_model

TURNS = 2
SESSIONS = 6


def requests(load: Load, seed: int) -> list[WorkloadRequest]:
    """Conversations that all begin at once; a second turn repeats the first."""
    made = []
    for session in range(SESSIONS):
        said = (Span(f"s{session}", 40 + 3 * session),)
        made.append(WorkloadRequest(0.0, said, 30, session=f"s{session}", turn=0))
        more = (*said, Span("", 30, 0), Span(f"t{session}", 20))
        made.append(WorkloadRequest(0.01, more, 30, session=f"s{session}", turn=1))
    return made


def test_all_systems_give_the_same_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Load, "requests", requests)
    folder = make_tiny_model(tmp_path, "llama", layers=2, max_len=256)
    threads = torch.get_num_threads()
    found: dict[str, dict[str, Any]] = {}
    try:
        for system in SYSTEMS:
            load = Load(SESSIONS, max_len=256)
            found[system.name] = run_cpu(system, str(folder), 17, load, "random", 0)
    finally:
        torch.set_num_threads(threads)
    assert len({one["answers"] for one in found.values()}) == 1
    for name, one in found.items():
        assert one["turns"] == TURNS * SESSIONS
        assert one["preemptions_per_turn"] > 0
        swaps = one["swaps"]
        assert (swaps["swaps"] > 0) == (name != "recompute")
    # Two layers: K and V of each by themselves.
    assert found["layer-major"]["swaps"]["copies"] == 4 * found["layer-major"]["swaps"]["blocks"]
    assert found["block-major"]["swaps"]["copies"] == found["block-major"]["swaps"]["blocks"]
    grouped = found["block groups"]["swaps"]
    assert 0 < grouped["copies"] < grouped["blocks"]
