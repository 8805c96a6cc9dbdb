"""Tenants who share one scheduler: random demand, checked after every step.

Time is counted in steps. The loop is the engine's: a step is planned while the one before
runs. Tokens mean nothing here; what counts is who is served.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict

from instance.config import SchedulerConfig
from instance.fairness import TenantCounters, service
from instance.kv.blocks import BlockPool
from instance.priority import PreemptionReason
from instance.request import (
    Account,
    FinishReason,
    Request,
    RequestClass,
    SamplingParams,
    Sequence,
    SequenceStatus,
    StepPlan,
)
from instance.scheduler import Scheduler

STANDARD = RequestClass.STANDARD


class Tenants:
    """A scheduler, its tenants' counters, and what an outsider sees of both.

    Args:
        weights: By tenant.
        num_blocks: Of the pool; a block holds 4 tokens.
        counters: To be tested; by default those of a lone instance.
        config: Of the scheduler.

    Attributes:
        step: Steps so far.
        served: Service by tenant and class, counted from plans and outputs alone.
        theta: The largest so far.
        gap: Widest gap ever between the counters of two waiting tenants of a class.
        spread: Widest difference ever of the service by weight that two tenants received
            over a time in which both waited.
        idle: Steps without a row although somebody could have run.
        returns: Steps between a preemption and the victim's return, by the reason.
    """

    def __init__(
        self,
        weights: dict[str, float],
        num_blocks: int = 4000,
        counters: TenantCounters | None = None,
        **config: int | float | bool,
    ) -> None:
        settings = {"max_model_len": 400, "enable_prefix_caching": False, **config}
        self.config = SchedulerConfig(**settings)  # type: ignore[arg-type]
        self.weights = weights
        self.counters = counters or TenantCounters(weights)
        self.pool = BlockPool(num_blocks, 4)
        self.scheduler = Scheduler(self.config, self.pool, counters=self.counters)
        self.step = 0
        self.served: Counter[Account] = Counter()
        self.requests: dict[str, Sequence] = {}
        self.done: dict[str, int] = {}
        self.gap = 0.0
        self.spread = 0.0
        self.idle = 0
        self.theta = self.scheduler.priorities.theta
        self._since: dict[tuple[Account, Account], float] = {}
        self._extremes: defaultdict[tuple[Account, Account], list[float]] = defaultdict(list)
        self._launched: StepPlan | None = None
        self._planned: StepPlan | None = None
        self._number = 0

    # ---- demand

    def submit(
        self,
        tenant: str,
        prompt: int,
        output: int,
        request_class: RequestClass = STANDARD,
        tokens: int | None = None,
    ) -> Sequence:
        """A request of ``tenant``; ``tokens`` tells prompts with a shared beginning apart."""
        name = f"{tenant}-{self._number}"
        self._number += 1
        request = Request(
            name,
            (self._number if tokens is None else tokens,) * prompt,
            SamplingParams(max_tokens=output),
            tenant=tenant,
            request_class=request_class,
            arrival=float(self._number),
        )
        sequence = Sequence.start(request)
        self.scheduler.add(sequence)
        self.requests[name] = sequence
        return sequence

    def backlog(self, tenant: str, request_class: RequestClass = STANDARD) -> int:
        """Requests of the tenant in the queue."""
        return sum(1 for s in self.scheduler.waiting if s.account == (tenant, request_class))

    # ---- steps

    def advance(self) -> None:
        """End the running step, launch the next one and plan the one after it."""
        self.step += 1
        core = self.scheduler
        if self._launched is not None:
            plan, self._launched = self._launched, None
            for emission in core.complete(plan, [9] * sum(row.samples for row in plan.rows)):
                self.served[emission.sequence.account] += int(service(0, len(emission.tokens)))
                if emission.finish_reason is FinishReason.LENGTH:
                    self.done[emission.sequence.request_id] = self.step
            self._count_prompts(plan)
        self.at_boundary()
        plan = self._planned or core.schedule()
        self._planned = None
        core.patch(plan)
        self._check_plan(plan)
        if plan.rows:
            self._launched = plan
            self._planned = core.schedule()
        elif core.waiting:
            self.idle += 1
        core.check_integrity()
        self.theta = max(self.theta, core.priorities.theta)
        self._look()

    def at_boundary(self) -> None:
        """What happens while no step is launched."""

    def boundary_drop(self, sequence: Sequence) -> None:
        """Take a sequence out, as a migration does."""
        if self._planned is not None:
            self.scheduler.drop(self._planned, sequence)
        self.scheduler.take_out(sequence)

    def _count_prompts(self, plan: StepPlan) -> None:
        """Prompt positions that were computed for the first time."""
        for sequence, start, length, _ in plan.rows:
            if sequence.status is SequenceStatus.FINISHED and sequence.finish_reason in (
                FinishReason.ABORT,
                FinishReason.NOT_FINISHED,
            ):
                continue
            name = sequence.request_id
            before = self._prompts.get(name, max(0, sequence.num_cached))
            now = max(before, min(start + length, sequence.num_prompt))
            self._prompts[name] = now
            self.served[sequence.account] += int(service(now - before, 0))

    @property
    def _prompts(self) -> dict[str, int]:
        return self.__dict__.setdefault("_prompt_marks", {})

    def _check_plan(self, plan: StepPlan) -> None:
        assert len(plan.rows) <= self.config.max_num_seqs
        assert plan.num_tokens <= self.config.max_num_batched_tokens
        served = {row.sequence for row in plan.rows}
        assert not served.intersection(plan.preempted)
        decodes = [
            s
            for s in self.scheduler.running
            if s.num_tokens - s.num_computed == 1 and s not in served
        ]
        assert not decodes, "a decode was skipped"

    def _look(self) -> None:
        for request_class in RequestClass:
            waiting = self.counters.waiting(request_class)
            if len(waiting) > 1:
                self.gap = max(self.gap, max(waiting.values()) - min(waiting.values()))
            self._look_at_pairs(request_class, sorted(waiting))

    def _look_at_pairs(self, request_class: RequestClass, waiting: list[str]) -> None:
        pairs = {
            ((one, request_class), (other, request_class))
            for one in waiting
            for other in waiting
            if one < other
        }
        for pair in [p for p in self._extremes if p[0][1] is request_class and p not in pairs]:
            del self._extremes[pair]
        for one, other in pairs:
            level = (
                self.served[one] / self.weights[one[0]]
                - self.served[other] / self.weights[other[0]]
            )
            low, high = self._extremes.get((one, other)) or (level, level)
            low, high = min(low, level), max(high, level)
            self._extremes[one, other] = [low, high]
            self.spread = max(self.spread, high - low)

    # ---- bounds

    @property
    def increment(self) -> float:
        """Service by weight that a tenant may be given in a step at most."""
        config = self.config
        batch = min(config.max_num_seqs, config.max_num_batched_tokens)
        return service(config.max_num_batched_tokens, batch) / min(self.weights.values())

    @property
    def bound(self) -> float:
        """Counters of waiting tenants never lie further apart."""
        # A reading is used for so many steps, and one step runs while another is planned.
        return self.theta + self.increment * (self.config.priority_interval + 2)

    def preemptions(self, reason: PreemptionReason) -> int:
        return self.scheduler.figures.preemptions[reason]


def keep_backlog(tenants: Tenants, rng: random.Random, sizes: dict[str, tuple[int, int]]) -> None:
    """Let every tenant named in ``sizes`` always have requests that wait."""
    for tenant, (prompt, output) in sizes.items():
        while tenants.backlog(tenant) < 3:
            tenants.submit(tenant, rng.randint(1, prompt), rng.randint(1, output))
