"""Steps launched behind the running one, whose tokens never leave the device."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from instance.config import EngineConfig, PreemptionMode, SchedulerConfig, SwapConfig
from instance.executor import Ints, StepBatch, StepResult
from instance.model.runner import TorchExecutor
from instance.request import FinishReason
from instance.scheduler import Emission
from tests.integration.models import make_tiny_model
from tests.integration.running import Running

Start = Callable[..., Running]


class FeedingExecutor(TorchExecutor):
    """Takes the tokens that the step before drew from there, as an executor on a GPU does."""

    feeds_back = True
    drawn: Ints
    fed = 0

    def _run(self, batch: StepBatch) -> StepResult:
        for at, draw in batch.feeds.items():
            batch.token_ids[at] = self.drawn[draw]
        self.fed += len(batch.feeds)
        result = super()._run(batch)
        self.drawn = result.tokens
        return result


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "m", "llama", layers=2)


@pytest.fixture
def start(model: Path) -> Iterator[Start]:
    started: list[Running] = []

    def make(
        kind: type[TorchExecutor] = FeedingExecutor,
        num_blocks: int = 256,
        swap: SwapConfig | None = None,
        **scheduler: int,
    ) -> Running:
        config = EngineConfig(
            model=str(model),
            dtype="float64",
            block_size=4,
            num_blocks=num_blocks,
            scheduler=SchedulerConfig(max_num_batched_tokens=32, **scheduler),
            swap=swap or SwapConfig(),
        )
        started.append(Running(kind(config), config))
        return started[-1]

    yield make
    for running in started:
        running.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0)


def submit_some(running: Running, stops: dict[str, tuple[int, ...]]) -> None:
    """Sequences of every kind, some of which end early where they draw a stop token."""
    draw = random.Random(5)
    kinds: list[dict[str, float]] = [
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 4},
        {"presence_penalty": 1.5},
    ]
    for index in range(8):
        prompt = [draw.randrange(32, 127) for _ in range(3 + 9 * index)]
        name = f"r{index}"
        more = kinds[index % 4] if index < 6 else {}
        # Nothing goes ahead of a draw with penalties: it needs the tokens before it.
        count = 6 if "presence_penalty" in more else 24
        running.submit(name, prompt, count, stop_token_ids=stops.get(name, ()), **more)


@pytest.mark.parametrize(
    ("num_blocks", "swap"),
    [
        (256, None),
        (40, None),
        (40, SwapConfig(num_blocks=200, preemption=PreemptionMode.SWAP)),
    ],
    ids=["room", "recompute", "swap"],
)
async def test_the_same_tokens_as_one_step_at_a_time(
    num_blocks: int, swap: SwapConfig | None, start: Start
) -> None:
    plain = start(TorchExecutor)
    submit_some(plain, {})
    await plain.done()
    # Each of these draws a stop token in mid-course, which the step launched ahead of it does
    # not know of.
    stops = {f"r{index}": (plain.tokens[f"r{index}"][9 + index],) for index in (0, 1, 5, 7)}
    expected = {
        name: tokens[: tokens.index(stops[name][0]) + 1] if name in stops else tokens
        for name, tokens in plain.tokens.items()
    }
    running = start(num_blocks=num_blocks, swap=swap)
    submit_some(running, stops)
    await running.done()
    assert running.tokens == expected
    assert isinstance(running.executor, FeedingExecutor)
    assert running.executor.fed > 20
    if num_blocks < 256:
        assert running.engine.scheduler.figures.preemptions.total() > 0


async def test_one_step_is_launched_behind_the_running_one(start: Start) -> None:
    running = start()
    engine = running.engine
    events: list[str] = []
    launch, complete = running.executor.launch, engine._complete

    def launched(*args: Any) -> None:
        events.append("launch")
        launch(*args)

    def completed(result: StepResult | BaseException) -> None:
        events.append("end")
        complete(result)

    running.executor.launch = launched  # type: ignore[method-assign]
    engine._complete = completed  # type: ignore[method-assign]
    for index in range(3):
        running.submit(f"r{index}", [40 + index, 50, 60], 40)
    await running.done()
    steps = running.engine.steps
    assert steps >= 40
    assert events == ["launch", "launch", *["end", "launch"] * (steps - 2), "end", "end"]


async def test_nothing_is_launched_at_a_boundary(start: Start) -> None:
    running = start()
    engine = running.engine
    for index in range(4):
        running.submit(f"r{index}", [40 + index, 50, 60], 120)
    found: list[tuple[bool, int]] = []

    def seen() -> None:
        kinds = [kind for kind, _ in running.events]
        found.append((engine.busy, kinds.count("launch") - kinds.count("end")))

    for index in range(8):
        await until(lambda enough=5 * (index + 1): len(running.tokens.get("r0", ())) >= enough)
        engine.at_boundary(seen)
        await until(lambda wanted=index + 1: len(found) == wanted)
    assert found == [(False, 0)] * 8
    # To leave and to come back between steps changes nothing.
    left: list[bool] = []
    sequence = engine.scheduler.sequences["r2"]
    engine.detach(sequence, left.append)
    await until(lambda: left)
    assert left == [True]
    assert sequence.num_computed == sequence.num_written == sequence.num_tokens - 1
    engine.put_back(sequence)
    await running.done()
    assert all(len(tokens) == 120 for tokens in running.tokens.values())


async def test_blocks_of_an_ended_sequence_are_safe_only_at_a_boundary(start: Start) -> None:
    running = start()
    engine = running.engine
    found: list[bool] = []
    told = running._step

    def note(emissions: list[Emission]) -> None:
        if any(one.finish_reason and one.sequence.request_id == "short" for one in emissions):
            # A step with a row of it has been launched already.
            assert engine.busy
            engine.when_blocks_are_safe(lambda: found.append(engine.busy))
            assert not found
        told(emissions)

    engine._on_step = note
    running.submit("long", [40, 50, 60], 30)
    running.submit("short", [41, 51, 61], 12)
    await running.done()
    assert found == [False]


async def test_a_step_that_fails_is_told_once(start: Start) -> None:
    running = start()
    running.submit("good", [40, 50, 60], 500)
    await until(lambda: len(running.tokens.get("good", ())) >= 5)
    failures: list[BaseException] = []
    failed = running.engine._on_failure

    def note(error: BaseException) -> None:
        failures.append(error)
        failed(error)

    running.engine._on_failure = note
    running.submit("bad", [10**9, 5], 4)
    with pytest.raises(BaseException, match=r"index|range|token"):
        await running.done()
    await asyncio.sleep(0.05)
    assert len(failures) == 1
    assert running.engine.failed
    assert not running.engine.busy


async def test_tokens_are_told_with_their_end(start: Start) -> None:
    """An end that is known beforehand leaves no row in the step launched ahead."""
    running = start()
    reasons: list[FinishReason] = []
    told = running._step

    def note(emissions: list[Emission]) -> None:
        reasons.extend(one.finish_reason for one in emissions)
        told(emissions)

    running.engine._on_step = note
    running.submit("one", [40, 50, 60], 1)
    running.submit("two", [41, 50, 60], 2)
    await running.done()
    assert sorted(reasons) == [0, FinishReason.LENGTH, FinishReason.LENGTH]
    assert isinstance(running.executor, FeedingExecutor)
    assert running.executor.fed == 1
