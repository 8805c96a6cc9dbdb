"""The engine in one process: real model, exact tokens, real overlap."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.integration.models import make_tiny_model
from tests.integration.running import Running, start_engine


@pytest.fixture
async def start() -> AsyncIterator[Callable[[Path], Running]]:
    started: list[Running] = []

    def make(folder: Path) -> Running:
        started.append(start_engine(folder))
        return started[-1]

    yield make
    for running in started:
        running.close()


async def test_next_step_is_planned_while_one_runs(
    tmp_path: Path, start: Callable[..., Running]
) -> None:
    running = start(make_tiny_model(tmp_path / "m", "llama"))
    for index in range(4):
        running.submit(f"r{index}", [20 + index, 30, 40], 40)
    await running.done()
    at = {event: index for index, event in enumerate(running.events)}
    steps = [number for kind, number in running.events if kind == "launch"]
    assert len(steps) >= 40
    # Step i + 1 is the next plan after step i was launched; see which came first: that
    # plan, or the end of step i. The tiny step may rarely be over sooner.
    ahead = sum(
        at["plan", later] < at["end", number] for number, later in itertools.pairwise(steps)
    )
    assert ahead > 0.9 * (len(steps) - 1)


async def test_arrival_during_a_step_joins_the_next_one(
    tmp_path: Path, start: Callable[..., Running]
) -> None:
    running = start(make_tiny_model(tmp_path / "m", "llama"))
    running.submit("first", [20, 21, 22], 60)
    while sum(kind == "launch" for kind, _ in running.events) < 5:
        await asyncio.sleep(0)
    running.submit("second", [30, 31, 32], 5)
    launched = [number for kind, number in running.events if kind == "launch"][-1]
    second = running.engine.scheduler.sequences["second"]
    while not second.num_computed:
        await asyncio.sleep(0)
    now = [number for kind, number in running.events if kind == "launch"][-1]
    assert now <= launched + 2
    await running.done()


async def test_abort_in_mid_step_frees_everything(
    tmp_path: Path, start: Callable[..., Running]
) -> None:
    running = start(make_tiny_model(tmp_path / "m", "llama"))
    for index in range(6):
        running.submit(f"r{index}", [20 + index] * 10, 200)
    while len(running.tokens) < 6:
        await asyncio.sleep(0.001)
    for index in range(6):
        running.engine.abort(f"r{index}")
        running.engine.scheduler.check_integrity()
    await asyncio.sleep(0.1)
    assert not running.engine.busy
    assert running.engine.pool.num_free == running.engine.pool.num_usable
    assert threading.active_count() < 50


async def test_failed_step_is_told(tmp_path: Path, start: Callable[..., Running]) -> None:
    running = start(make_tiny_model(tmp_path / "m", "llama"))
    running.submit("bad", [10**9, 5], 4)
    with pytest.raises(BaseException, match=r"index|range|token"):
        await running.done()
    assert running.engine.failed
