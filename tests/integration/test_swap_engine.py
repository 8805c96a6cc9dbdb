"""Swapping with a real model and real tensors: exact tokens, exact KV, steps beside copies."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import pytest

from instance.config import EngineConfig, PreemptionMode, SchedulerConfig, SwapConfig, SwapMode
from instance.executor import CopyDone, CopyRun
from instance.kv.swap import Swap
from instance.model.runner import TorchExecutor
from instance.request import RequestClass, SequenceStatus
from tests.integration.models import make_tiny_model
from tests.integration.running import Running

SWAP = SwapConfig(num_blocks=400, preemption=PreemptionMode.SWAP)
Start = Callable[..., Running]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "m", "llama")


@pytest.fixture
async def start(model: Path) -> AsyncIterator[Start]:
    started: list[Running] = []

    def make(num_blocks: int, swap: SwapConfig, **scheduler: int | bool) -> Running:
        config = EngineConfig(
            model=str(model),
            dtype="float64",
            block_size=4,
            num_blocks=num_blocks,
            scheduler=SchedulerConfig(**scheduler),  # type: ignore[arg-type]
            swap=swap,
        )
        started.append(Running(TorchExecutor(config), config))
        return started[-1]

    yield make
    for running in started:
        running.close()


def swap_of(running: Running) -> Swap:
    swap = running.engine.scheduler.swap
    assert swap is not None
    return swap


def prompts(count: int, length: int) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(32, 127) for _ in range(length + 3 * i)] for i in range(count)]


async def outputs(running: Running, count: int, length: int, tokens: int) -> dict[str, list[int]]:
    for index, prompt in enumerate(prompts(count, length)):
        running.submit(f"r{index}", prompt, tokens, temperature=0.7, seed=index)
    await running.done()
    return running.tokens


@pytest.mark.parametrize(
    "swap",
    [
        dataclasses.replace(SWAP, mode=mode, reuse=reuse)
        for mode in SwapMode
        for reuse in (True, False)
    ],
    ids=lambda swap: f"{swap.mode}-{'reuse' if swap.reuse else 'fresh'}",
)
async def test_preempted_sequences_write_the_same_text(start: Start, swap: SwapConfig) -> None:
    roomy = await outputs(start(500, SwapConfig()), 8, 20, 40)
    tight = start(60, swap)
    assert await outputs(tight, 8, 20, 40) == roomy
    figures = swap_of(tight).figures
    assert figures.out > 0
    assert figures.back > 0
    assert figures.bytes_out == figures.blocks_out * swap_of(tight).cost.block_bytes
    assert sum(figures.lost) >= figures.back - figures.hit_blocks
    assert figures.lost_seconds > 0
    if swap.mode is SwapMode.SYNC:
        assert figures.stalls > 0
        assert figures.stall_seconds > 0


async def test_kv_returns_bit_by_bit(start: Start) -> None:
    running = start(60, SWAP)
    executor, swap = running.executor, swap_of(running)
    kv, host = executor.kv, executor.copier
    assert kv is not None
    assert host is not None
    host_kv = host.host
    assert host_kv is not None
    gone: dict[int, bytes] = {}
    compared = 0
    copy_out, copy_in = host.copy_out, host.copy_in

    def out(runs: Sequence[CopyRun], done: CopyDone) -> None:
        for run in runs:
            for at in range(run.count):
                gone[run.host + at] = bytes(kv.read(run.device + at, 1))

        def compare(result: float | BaseException) -> None:
            for run in runs:
                for at in range(run.count):
                    assert bytes(host_kv.read(run.host + at, 1)) == gone[run.host + at]
            done(result)

        copy_out(runs, compare)

    def back(runs: Sequence[CopyRun], done: CopyDone) -> None:
        def compare(result: float | BaseException) -> None:
            nonlocal compared
            for run in runs:
                for at in range(run.count):
                    assert bytes(kv.read(run.device + at, 1)) == gone[run.host + at]
                    compared += 1
            done(result)

        # All ones are a NaN in every float format: nothing may be left of what was there.
        for run in runs:
            kv.write(run.device, 0, b"\xff" * (run.count * kv.block_bytes))
        copy_in(runs, compare)

    host.copy_out, host.copy_in = out, back  # type: ignore[method-assign]
    await outputs(running, 8, 20, 40)
    assert compared == swap.figures.blocks_in > 0


class Gate:
    """Holds back the copies of an executor until opened."""

    def __init__(self, executor: TorchExecutor) -> None:
        self.opened = threading.Event()
        self.waiting = 0
        copier = executor.copier
        assert copier is not None
        lane = copier._out  # type: ignore[attr-defined]
        submit = lane.submit

        def gated(work: Callable[[], float], done: CopyDone) -> None:
            def wait() -> float:
                self.waiting += 1
                assert self.opened.wait(60)
                return work()

            submit(wait, done)

        lane.submit = gated


@pytest.fixture
def gates() -> Iterator[Callable[[TorchExecutor], Gate]]:
    made: list[Gate] = []

    def make(executor: TorchExecutor) -> Gate:
        made.append(Gate(executor))
        return made[-1]

    yield make
    for gate in made:
        gate.opened.set()


async def test_steps_go_on_while_a_copy_is_on_its_way(
    start: Start, gates: Callable[[TorchExecutor], Gate]
) -> None:
    running = start(100, dataclasses.replace(SWAP, mode=SwapMode.ASYNC, save=False), max_num_seqs=2)
    scheduler, gate = running.engine.scheduler, gates(running.executor)
    small, large, urgent = prompts(3, 60)
    running.submit("a small one", small, 100)
    running.submit("the large one", [*large, *large], 60)
    while len(scheduler.running) < 2:
        await asyncio.sleep(0.001)
    # The batch has no place for it but that of the last one in it.
    running.submit("urgent", urgent, 10, request_class=RequestClass.INTERACTIVE)
    while not gate.waiting:
        await asyncio.sleep(0.001)
    steps = running.engine.steps
    while "urgent" in scheduler.sequences:
        await asyncio.sleep(0.001)
    assert running.engine.steps >= steps + 9
    assert swap_of(running).awaited
    assert scheduler.sequences["the large one"].status is SequenceStatus.WAITING
    gate.opened.set()
    await running.done()
    assert len(running.tokens["the large one"]) == 60


async def test_the_second_turn_reads_back_what_was_displaced(start: Start) -> None:
    running = start(100, SWAP, max_num_seqs=2)
    turn = prompts(1, 80)[0]
    running.submit("first", turn, 8)
    await running.done()
    running.finished.clear()
    for index in range(10):
        running.submit(f"other{index}", prompts(11, 60)[index + 1], 8)
    await running.done()
    running.finished.clear()
    again = [*turn, *running.tokens["first"], 40, 41, 42]
    running.submit("second", again, 8)
    second = running.engine.scheduler.sequences["second"]
    await running.done()
    figures = swap_of(running).figures
    assert figures.saved_blocks > 0
    assert figures.hit_blocks > 0
    # The KV of all full blocks of the first turn; that of its last token was never computed.
    assert second.num_cached == (len(turn) + 7) // 4 * 4
    fresh = start(500, SwapConfig())
    fresh.submit("second", again, 8)
    await fresh.done()
    assert fresh.tokens["second"] == running.tokens["second"]


async def test_cancelled_sequences_leave_nothing_behind(start: Start) -> None:
    running = start(60, SWAP)
    scheduler, figures = running.engine.scheduler, swap_of(running).figures
    rng = random.Random(0)
    for round_ in range(6):
        copies = figures.out + figures.back
        for index, prompt in enumerate(prompts(8, 24)):
            running.submit(f"r{round_}-{index}", prompt, 60)
        # More than fits, so somebody must leave; then with the copy under way, and with what
        # follows from it, they are cancelled one by one.
        while figures.out + figures.back == copies:
            await asyncio.sleep(0)
        while scheduler.sequences:
            running.engine.abort(rng.choice(list(scheduler.sequences)))
            scheduler.check_integrity()
            steps = running.engine.steps
            while scheduler.running and running.engine.steps < steps + 2:
                await asyncio.sleep(0)
    while running.engine.busy or running.engine.pool.num_draining:
        await asyncio.sleep(0.001)
    scheduler.check_integrity()
    assert running.engine.pool.num_free == running.engine.pool.num_usable
    host = swap_of(running).host
    assert host.num_free == host.num_usable
    assert figures.out > 0
