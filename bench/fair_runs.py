"""One run of one scheduler of ``bench.fair_instance``, on a virtual clock.

All share the engine, its cost profile and the workload:

drover
    The instance as it is served, with or without a theta of its own.
fcfs
    The same, but for counters that are all alike: in the order of arrival.
vtc
    Virtual Token Counter (Sheng et al., OSDI '24) without preemption, as its authors run it:
    every ten steps requests enter while the KV of their prompts and of all their output fits,
    the tenant with the least counter first, and nobody passes one that does not fit.
fcfs, reserved
    The same in the order of arrival.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.report import percentile
from bench.service_record import WatchedCounters
from cluster.simulation.answers import Answers
from cluster.simulation.device import device, vocabulary
from cluster.simulation.engine import SimulatedEngine
from cluster.simulation.profile import CostProfile
from cluster.simulation.workloads.records import WorkloadRequest, prompt_ids
from instance.clock import VirtualClock
from instance.config import EngineConfig, SchedulerConfig
from instance.fairness import service
from instance.request import Request, SamplingParams
from instance.request import Sequence as LiveSequence
from instance.scheduler import Emission


@dataclass(frozen=True, slots=True)
class System:
    """A way of choosing who is served.

    Attributes:
        name: Of the system.
        theta: Of the scheduler; None: its own.
        blind: In the order of arrival.
        reserves: A request enters once its whole KV fits; it is tried every so many steps.
            0: there is no such condition.
    """

    name: str
    theta: float | None = None
    blind: bool = False
    reserves: int = 0


DROVER = System("drover")
FCFS = System("fcfs", math.inf, blind=True)
VTC = System("vtc", math.inf, reserves=10)
FCFS_RESERVED = System("fcfs, reserved", math.inf, blind=True, reserves=10)


def at_theta(theta: float) -> System:
    """Drover with a fixed theta."""
    return System(f"theta {theta:g}", theta)


class Reservations:
    """The queues before an instance that reserves memory for all that a request may write.

    Args:
        num_blocks: Of the pool.
        block_size: Tokens of a block.
        counters: Order the tenants.
        enter: Takes a sequence.
        blind: One queue, in the order of arrival.
        every: Steps between two times that requests may enter; they also may where nobody is
            inside.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        counters: WatchedCounters,
        enter: Callable[[LiveSequence], None],
        blind: bool,
        every: int = 1,
    ) -> None:
        self._every = every
        self._steps = 0
        self._free = num_blocks
        self._block_size = block_size
        self._counters = counters
        self._enter = enter
        self._blind = blind
        self._queues: dict[str, deque[LiveSequence]] = {}
        self._inside: dict[LiveSequence, None] = {}

    def submit(self, sequence: LiveSequence) -> None:
        """Queue a request; it enters at once where it may."""
        name = "" if self._blind else sequence.request.tenant
        self._counters.waiting_begins(sequence.account, sequence.request_id)
        self._queues.setdefault(name, deque()).append(sequence)
        if self._every == 1 or not self._inside:
            self._admit()

    def ended(self, sequence: LiveSequence) -> None:
        """A request has given its memory back."""
        del self._inside[sequence]
        self._free += self._blocks(sequence)

    def stepped(self) -> None:
        """A step has ended, and who ended with it has left."""
        self._steps += 1
        if self._steps >= self._every or not self._inside:
            self._admit()

    def _admit(self) -> None:
        """Let in who fits, by least counter; the first that does not fit ends it."""
        self._steps = 0
        while heads := [queue[0] for queue in self._queues.values() if queue]:
            owed = self._owed()
            head = min(heads, key=lambda one: (self._standing(one, owed), one.request.arrival))
            if self._blocks(head) > self._free:
                return
            self._free -= self._blocks(head)
            self._inside[head] = None
            self._queues["" if self._blind else head.request.tenant].popleft()
            self._enter(head)

    def _standing(self, sequence: LiveSequence, owed: Mapping[str, int]) -> float:
        tenant = sequence.request.tenant
        counter = self._counters.counter(sequence.account)
        return counter + service(owed.get(tenant, 0), 0) / self._counters.weight(tenant)

    def _owed(self) -> dict[str, int]:
        """Prompt tokens of those inside that are not charged yet: a tenant pays at entry."""
        owed: dict[str, int] = {}
        for one in self._inside:
            if one.charged_prompt < one.num_prompt:
                tenant = one.request.tenant
                owed[tenant] = owed.get(tenant, 0) + one.num_prompt - one.charged_prompt
        return owed

    def _blocks(self, sequence: LiveSequence) -> int:
        tokens = sequence.num_prompt + sequence.request.params.max_tokens
        return -(-tokens // self._block_size)


class Run:
    """Serves a workload for a time; what is not served by then stays so.

    Args:
        system: Who chooses.
        profile: Of the instance.
        workload: Requests by arrival.
        weights: By tenant; 1 where there is none.
        seed: Of the contents.
    """

    def __init__(
        self,
        system: System,
        profile: CostProfile,
        workload: Sequence[WorkloadRequest],
        weights: Mapping[str, float],
        seed: int,
    ) -> None:
        self._clock = clock = VirtualClock()
        self._seed = seed
        self._weights = weights
        self._counters = counters = WatchedCounters(weights, clock, system.blind)
        self._vocab, end_token = vocabulary(profile.model)
        self._answers = Answers(self._vocab, end_token, seed)
        self._arrived: dict[str, WorkloadRequest] = {}
        self._first: dict[str, float] = {}
        self._tokens = 0
        self._theta = 0.0
        model = profile.model
        host_bytes = profile.num_host_blocks * profile.block_bytes
        made = device(profile, 0.0, host_bytes)(clock)
        longest = profile.num_blocks * model.block_size
        config = EngineConfig(
            scheduler=SchedulerConfig(max_model_len=longest, theta=system.theta),
        )
        self._engine = SimulatedEngine(
            made.executor,
            config,
            clock,
            made.cost,
            self._answers,
            self._stepped,
            lambda sequences, times: None,
            self._failed,
            lambda sequence: None,
            counters,
            # Charges are noted at the step that they belong to.
            jumps=False,
        )
        self._gate: Reservations | None = None
        self._submit: Callable[[LiveSequence], None] = self._engine.submit
        if system.reserves:
            enter = self._engine.submit
            self._gate = Reservations(
                profile.num_blocks,
                model.block_size,
                counters,
                enter,
                system.blind,
                system.reserves,
            )
            self._submit = self._gate.submit
        for number, asked in enumerate(workload):
            clock.call_at(asked.arrival, functools.partial(self._arrive, f"r{number}", asked))

    def result(self, seconds: float) -> dict[str, Any]:
        """Run until a time, and tell what came of it by then.

        Returns:
            ``gap``: largest difference of the counters of two tenants that waited.
            ``spread``: of the service that two tenants received while both waited.
            ``bound``: what it may be; ``theta``: the largest.
            ``window_max``, ``window_mean``: service difference per second in 60 s.
            ``service``, ``tokens``: prompt tokens and twice the output tokens, and output
            tokens, per second.
            ``received``: each tenant's service by its weight. ``small_ttft``: mean and 99th
            percentile, in seconds, of the half of the tenants that asked least; who still
            waits has waited until the end.
        """
        began = time.process_time()
        self._clock.run_until(seconds)
        self._engine.scheduler.check_integrity()
        scheduler, record = self._engine.scheduler, self._counters.record
        config = scheduler.config
        least = min(self._weights.get(asked.tenant, 1.0) for asked in self._arrived.values())
        step = service(config.max_num_batched_tokens, scheduler.max_num_seqs) / least
        received = record.received(0.0, seconds)
        windows = record.differences(seconds)
        swap = scheduler.swap
        assert swap is not None
        preemptions = scheduler.figures.preemptions
        return {
            "gap": self._counters.gap,
            "spread": self._counters.spread.most,
            "theta": self._theta,
            "bound": self._theta + (config.priority_interval + 2) * step,
            "window_max": max(windows),
            "window_mean": statistics.fmean(windows),
            "service": sum(
                value * self._weights.get(tenant, 1.0) for tenant, value in received.items()
            )
            / seconds,
            "tokens": self._tokens / seconds,
            "received": received,
            "small_ttft": self._small_waits(seconds),
            "steps": self._engine.steps,
            "preemptions": {reason.value: count for reason, count in preemptions.items()},
            "swapped_bytes": swap.figures.bytes_out + swap.figures.bytes_in,
            "recomputed_tokens": self._counters.system,
            "cpu_seconds": time.process_time() - began,
        }

    def _small_waits(self, end: float) -> tuple[float, float]:
        asked = self._counters.record.asked_until(end)
        small = sorted(asked, key=lambda tenant: asked[tenant])[: len(asked) // 2]
        waits = [
            self._first.get(name, end) - one.arrival
            for name, one in self._arrived.items()
            if one.tenant in small
        ]
        return statistics.fmean(waits), percentile(waits, 99)

    def _arrive(self, name: str, asked: WorkloadRequest) -> None:
        self._engine.interrupt()
        now, output = self._clock.now(), asked.output_tokens
        self._arrived[name] = asked
        self._counters.record.asked(asked.tenant, asked.prompt_tokens, output, now)
        self._answers.prepare(name, output)
        params = SamplingParams(max_tokens=output, ignore_eos=True)
        prompt = tuple(prompt_ids(asked, self._vocab, self._seed))
        request = Request(name, prompt, params, tenant=asked.tenant, arrival=now)
        self._submit(LiveSequence.start(request))

    def _stepped(self, emissions: list[Emission]) -> None:
        now = self._clock.now()
        for emission in emissions:
            sequence = emission.sequence
            self._tokens += len(emission.tokens)
            self._first.setdefault(sequence.request_id, now)
            if emission.finish_reason:
                if sequence.error:
                    raise RuntimeError(f"{sequence.request_id}: {sequence.error}")
                self._answers.forget(sequence.request_id)
                if self._gate is not None:
                    self._gate.ended(sequence)
        if self._gate is not None:
            self._gate.stepped()
        self._counters.look()
        theta = self._engine.scheduler.priorities.theta
        self._theta = max(self._theta, theta)

    def _failed(self, error: BaseException) -> None:
        raise error
