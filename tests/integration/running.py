"""Runs an engine with a real model on the event loop of a test."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from instance.clock import RealClock
from instance.config import EngineConfig, SchedulerConfig
from instance.engine import Engine
from instance.executor import StepBatch, StepResult
from instance.model.runner import TorchExecutor
from instance.request import Request, RequestClass, SamplingParams, Sequence, StepPlan
from instance.scheduler import Emission


class Running:
    """An engine on the test's event loop, its tokens, and a log of what happened when."""

    def __init__(self, executor: TorchExecutor, config: EngineConfig) -> None:
        self.executor = executor
        self.events: list[tuple[str, int]] = []
        self.tokens: dict[str, list[int]] = {}
        self.finished = asyncio.Event()
        self.wanted = 0
        self.failure: BaseException | None = None
        loop = asyncio.get_running_loop()
        launch = executor.launch

        def logged(batch: StepBatch, done: Callable[[StepResult | BaseException], None]) -> None:
            def ended(result: StepResult | BaseException) -> None:
                self.events.append(("end", batch.number))
                done(result)

            self.events.append(("launch", batch.number))
            launch(batch, ended)

        executor.launch = logged  # type: ignore[method-assign]
        self.engine = Engine(
            executor, config, RealClock(), loop.call_soon_threadsafe, self._step, self._failed
        )
        schedule = self.engine.scheduler.schedule

        def planned() -> StepPlan:
            plan = schedule()
            self.events.append(("plan", plan.number))
            return plan

        self.engine.scheduler.schedule = planned  # type: ignore[method-assign]

    def _step(self, emissions: list[Emission]) -> None:
        for emission in emissions:
            tokens = self.tokens.setdefault(emission.sequence.request_id, [])
            assert emission.index == len(tokens)
            tokens.extend(emission.tokens)
            if emission.finish_reason:
                self.wanted -= 1
        if not self.wanted:
            self.finished.set()

    def _failed(self, error: BaseException) -> None:
        self.failure = error
        self.finished.set()

    def submit(self, name: str, prompt: list[int], max_tokens: int, **params: Any) -> None:
        self.wanted += 1
        params.setdefault("temperature", 0.0)
        request_class = params.pop("request_class", RequestClass.STANDARD)
        request = Request(
            name,
            tuple(prompt),
            SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params),
            request_class=request_class,
        )
        self.engine.submit(Sequence.start(request))

    async def done(self) -> None:
        await asyncio.wait_for(self.finished.wait(), 120)
        if self.failure is not None:
            raise self.failure
        async with asyncio.timeout(60):
            while self.engine.pool.num_draining:  # a copy to the host
                await asyncio.sleep(0.001)
        self.engine.scheduler.check_integrity()
        assert self.engine.pool.num_free == self.engine.pool.num_usable

    def close(self) -> None:
        """End the executor's thread."""
        self.executor.close()


def start_engine(folder: Path, num_blocks: int = 256, **scheduler: Any) -> Running:
    """Run an engine in float64 with blocks of 4 tokens; close it when done.

    Args:
        folder: The model.
        num_blocks: Size of the pool.
        scheduler: Settings of ``SchedulerConfig``.
    """
    config = EngineConfig(
        model=str(folder),
        dtype="float64",
        block_size=4,
        num_blocks=num_blocks,
        scheduler=SchedulerConfig(**scheduler),
    )
    return Running(TorchExecutor(config), config)
