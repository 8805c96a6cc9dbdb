"""What one run of ``bench.context_switch`` is asked and tells; and a modelled run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.campaign import traces
from bench.switch_load import INTERVAL, Conversations, OwnPriorities, PriorityTrace, latencies
from bench.switch_systems import CopyFigures, GranularCopier, System
from cluster.simulation.answers import Answers
from cluster.simulation.device import vocabulary
from cluster.simulation.engine import SimulatedEngine
from cluster.simulation.profile import CostProfile
from cluster.simulation.workloads.arrivals import renewal
from cluster.simulation.workloads.records import WorkloadRequest, by_arrival
from cluster.simulation.workloads.sources import load_workload
from instance.clock import Clock, VirtualClock
from instance.config import EngineConfig, SchedulerConfig
from instance.engine import Engine
from instance.kv.blocks import BlockPool
from instance.kv.figures import SwapFigures
from instance.model.modelled import ModelledExecutor
from instance.model.modelled_copier import ModelledCopier
from instance.request import Sequence
from instance.scheduler import Emission, Scheduler

TRACE = "sharegpt_multiround_4000conv.csv.gz"


@dataclass(frozen=True, slots=True)
class Load:
    """A workload of conversations.

    Turns come in a Poisson process, and belong to the conversations in random order. One whose
    predecessor is not answered by then is sent as soon as that is.

    Attributes:
        sessions: How many conversations, chosen at random.
        rate: Turns per second.
        scale: Multiplies all lengths.
        max_len: Longest conversation, in tokens; one ends before its first turn beyond.
    """

    sessions: int
    rate: float = 1.0
    scale: float = 1.0
    max_len: int = 8192

    def requests(self, seed: int) -> list[WorkloadRequest]:
        """The turns of these conversations, by arrival.

        Raises:
            WorkloadError: if the trace is not where DROVER_TRACES points.
        """
        turns = load_workload(
            f"sharegpt:{traces() / TRACE}?sessions={self.sessions}&scale={self.scale}"
            f"&max-len={self.max_len}&fit=drop",
            seed,
        )
        rng = np.random.default_rng([seed, 0x5917C4])
        times = renewal(rng, self.rate, 1.0, len(turns)).tolist()
        sessions: dict[str, list[float]] = {}
        for at, index in zip(times, rng.permutation(len(turns)).tolist(), strict=True):
            sessions.setdefault(turns[index].session, []).append(at)
        return by_arrival(
            dataclasses.replace(turn, arrival=sessions[turn.session][turn.turn], think=None)
            for turn in turns
        )


class Occupancy:
    """How much of a pool is in use, over time."""

    def __init__(self, pool: BlockPool, clock: Clock) -> None:
        self._pool = pool
        self._clock = clock
        self._last = clock.now()
        self._busy = self._used = self._seconds = 0.0

    def note(self, scheduler: Scheduler) -> None:
        """A step has ended."""
        now = self._clock.now()
        passed, self._last = now - self._last, now
        share = 1 - self._pool.num_free / self._pool.num_usable
        self._seconds += passed
        if scheduler.waiting:
            self._busy += passed
            self._used += passed * share

    def figures(self) -> dict[str, float]:
        """``contended_share`` of the time somebody waits; ``occupancy`` then."""
        return {
            "contended_share": self._busy / self._seconds if self._seconds else 0.0,
            "occupancy": self._used / self._busy if self._busy else 0.0,
        }


def figures(
    engine: Engine,
    clients: Conversations,
    priorities: PriorityTrace | OwnPriorities,
    copier: GranularCopier | None,
    occupancy: Occupancy,
) -> dict[str, Any]:
    """What one run came to."""
    turns = list(clients.turns.values())
    scheduler = engine.scheduler
    copied = (CopyFigures(), CopyFigures()) if copier is None else (copier.all, copier.full)
    swapped = SwapFigures() if scheduler.swap is None else scheduler.swap.figures
    return {
        **latencies(turns, clients.last_due),
        **occupancy.figures(),
        "turns": len(turns),
        "steps": engine.steps,
        "step_seconds": engine.step_seconds_total,
        "preemptions": {
            reason.value: count for reason, count in scheduler.figures.preemptions.items()
        },
        "preemptions_per_turn": sum(turn.preemptions for turn in turns) / len(turns),
        "prompt_tokens": sum(turn.prompt for turn in turns),
        "computed": priorities.computed,
        "computed_again": priorities.computed_again,
        "swaps": dataclasses.asdict(copied[0]),
        "swaps_full": dataclasses.asdict(copied[1]),
        "bytes_out": swapped.bytes_out,
        "bytes_in": swapped.bytes_in,
        "stall_seconds": swapped.stall_seconds,
        "lost_seconds": swapped.lost_seconds,
        "kept_blocks": swapped.kept_blocks,
        "hit_blocks": swapped.hit_blocks,
        "saved_blocks": swapped.saved_blocks,
        "decisions": {"/".join(key): count for key, count in swapped.decisions.items()},
    }


def scheduling(max_model_len: int, system: System) -> SchedulerConfig:
    """The engine's defaults, but that any difference in the given priorities preempts."""
    if system.own:
        return SchedulerConfig(max_model_len=max_model_len)
    return SchedulerConfig(max_model_len=max_model_len, theta=0.0, priority_interval=INTERVAL)


def counters(system: System, pattern: str, seed: int) -> PriorityTrace | OwnPriorities:
    """Who orders the conversations."""
    return OwnPriorities() if system.own else PriorityTrace(pattern, seed)


def run_modelled(
    system: System, profile: CostProfile, load: Load, pattern: str, seed: int
) -> dict[str, Any]:
    """The engine on a virtual clock, with steps and copies that last as a profile says."""
    began = time.process_time()
    clock = VirtualClock()
    model = profile.model
    copier = None
    config = EngineConfig(scheduler=scheduling(model.max_model_len, system))
    if system.swap is not None:
        config = dataclasses.replace(config, swap=system.swap)
        block_bytes = profile.block_bytes

        def calls(blocks: int, runs: int) -> int:
            return system.copies(blocks, runs, model.num_layers)

        inner = ModelledCopier(
            profile.num_host_blocks + 1,
            block_bytes,
            clock,
            lambda size, runs: profile.copy_out.seconds(size, calls(size // block_bytes, runs)),
            lambda size, runs: profile.copy_in.seconds(size, calls(size // block_bytes, runs)),
            system.one_stream,
        )
        copier = GranularCopier(inner, calls)
    executor = ModelledExecutor(model, profile.num_blocks + 1, clock, profile.step, copier)
    vocab, end_token = vocabulary(model)
    answers = Answers(vocab, end_token, seed)
    priorities = counters(system, pattern, seed)

    def submit(sequence: Sequence) -> None:
        engine.interrupt()
        engine.submit(sequence)

    def stepped(emissions: list[Emission]) -> None:
        priorities.steps = engine.steps
        occupancy.note(engine.scheduler)
        clients.stepped(emissions)
        for emission in emissions:
            if emission.finish_reason:
                answers.forget(emission.sequence.request_id)

    def decoded(sequences: SequenceOf[Sequence], times: SequenceOf[float]) -> None:
        priorities.steps = engine.steps + len(times)
        occupancy.note(engine.scheduler)
        clients.decoded(sequences, times)

    def failed(error: BaseException) -> None:
        raise error

    clients = Conversations(load.requests(seed), clock, submit, vocab, seed, expect=answers.prepare)
    engine = SimulatedEngine(
        executor,
        config,
        clock,
        profile.step,
        answers,
        stepped,
        decoded,
        failed,
        clients.preempted,
        priorities,
    )
    if copier is not None:
        copier.pool = engine.pool
    occupancy = Occupancy(engine.pool, clock)
    clients.start()
    while clients.open and clock.run_next():
        pass
    if clients.open:
        raise RuntimeError(f"{clients.open} turns were never answered")
    engine.scheduler.check_integrity()
    found = figures(engine, clients, priorities, copier, occupancy)
    return {**found, "cpu_seconds": time.process_time() - began}
