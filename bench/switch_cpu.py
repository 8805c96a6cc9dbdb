"""One run of one system of ``bench.context_switch`` with a real model on the CPU."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

from bench.switch_load import Conversations
from bench.switch_runs import Load, Occupancy, counters, figures, scheduling
from bench.switch_systems import GranularCopier, System
from instance.clock import RealClock
from instance.config import EngineConfig
from instance.engine import Engine
from instance.kv.copier import TensorCopier
from instance.model.runner import TorchExecutor
from instance.scheduler import Emission

HOST_FACTOR = 8
"""Host blocks for each block of the pool."""


class SwitchExecutor(TorchExecutor):
    """A model on the CPU whose KV is copied as a system wants it.

    Args:
        config: As for ``TorchExecutor``.
        system: Says how finely.
    """

    def __init__(self, config: EngineConfig, system: System) -> None:
        super().__init__(config)
        inner = self.copier
        self.granular: GranularCopier | None = None
        if inner is None:
            return
        layers = self.description.num_layers
        pieces = system.copies(1, 1, layers) if system.per_block else 0
        if pieces > 1:
            hosts = inner.num_host_blocks
            inner.close()
            inner = TensorCopier(
                self._kv.view(self.num_blocks * pieces, *self._kv.shape[3:]),
                hosts * pieces,
                lambda first, count: self._attention.written(first // pieces, 1),
            )
        self.copier = self.granular = GranularCopier(
            inner, lambda blocks, runs: system.copies(blocks, runs, layers), pieces
        )


def run_cpu(
    system: System, model: str, num_blocks: int, load: Load, pattern: str, seed: int
) -> dict[str, Any]:
    """The engine with a real model in float32, on this machine's clock."""
    return asyncio.run(_run_cpu(system, model, num_blocks, load, pattern, seed))


async def _run_cpu(
    system: System, model: str, num_blocks: int, load: Load, pattern: str, seed: int
) -> dict[str, Any]:
    began = time.process_time()
    config = EngineConfig(
        model=model,
        dtype="float32",
        num_blocks=num_blocks,
        num_threads=1,
        scheduler=scheduling(load.max_len, system),
    )
    if system.swap is not None:
        swap = dataclasses.replace(system.swap, num_blocks=HOST_FACTOR * num_blocks)
        config = dataclasses.replace(config, swap=swap)
    executor = SwitchExecutor(config, system)
    try:
        loop, clock = asyncio.get_running_loop(), RealClock()
        ended: asyncio.Future[None] = loop.create_future()
        priorities = counters(system, pattern, seed)

        def stepped(emissions: list[Emission]) -> None:
            priorities.steps = engine.steps
            occupancy.note(engine.scheduler)
            clients.stepped(emissions)

        def post(call: Callable[[], None]) -> None:
            loop.call_soon_threadsafe(call)

        engine = Engine(
            executor,
            config,
            clock,
            post,
            stepped,
            ended.set_exception,
            lambda sequence: clients.preempted(sequence),
            priorities,
        )
        if executor.granular is not None:
            executor.granular.pool = engine.pool
        occupancy = Occupancy(engine.pool, clock)
        clients = Conversations(
            load.requests(seed),
            clock,
            engine.submit,
            range(100, executor.description.vocab_size),
            seed,
            lambda: ended.set_result(None),
        )
        clients.start()
        await ended
        while engine.pool.num_draining:  # copies that nobody waits for
            await asyncio.sleep(0.01)
        engine.scheduler.check_integrity()
        found = figures(engine, clients, priorities, executor.granular, occupancy)
        said = json.dumps(sorted(clients.answers.items())).encode()
        return {
            **found,
            "answers": hashlib.sha256(said).hexdigest(),
            "cpu_seconds": time.process_time() - began,
        }
    finally:
        executor.close()
