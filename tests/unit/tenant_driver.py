"""Tenants who share one scheduler, watched from outside.

The loop is the engine's: a step is planned while the one before runs. Tokens mean nothing
here; what counts is who is served.
"""

from __future__ import annotations

import random
from collections import Counter

from instance.config import SchedulerConfig
from instance.fairness import TenantCounters, service
from instance.kv.blocks import BlockPool
from instance.priority import PreemptionReason
from instance.request import (
    Account,
    Request,
    RequestClass,
    SamplingParams,
    Sequence,
    SequenceStatus,
    StepPlan,
)
from instance.scheduler import Scheduler

STANDARD = RequestClass.STANDARD
Pair = tuple[Account, Account]


class Recording(TenantCounters):
    """Counters that also keep the plain service charged to each account."""

    def __init__(self, weights: dict[str, float]) -> None:
        super().__init__(weights)
        self.charged: Counter[Account] = Counter()

    def charge(self, account: Account, prompt: int, output: int) -> None:
        super().charge(account, prompt, output)
        self.charged[account] += int(service(prompt, output))


class Tenants:
    """A scheduler and its tenants.

    Args:
        weights: By tenant.
        num_blocks: Of the pool; a block holds 4 tokens.
        counters: By default those of a lone instance.
        config: Of the scheduler.

    Attributes:
        steps: So far.
        theta: The largest so far.
        gap: Widest gap ever between the counters of two waiting tenants of a class.
        spread: Widest difference ever of the service by weight that two tenants received
            over a time in which both waited.
        idle: Steps without a row although somebody waited.
        preempted: Victims so far.
    """

    def __init__(
        self,
        weights: dict[str, float],
        num_blocks: int = 1000,
        counters: Recording | None = None,
        **config: int | float | bool | None,
    ) -> None:
        settings = {"max_model_len": 400, "enable_prefix_caching": False, **config}
        self.config = SchedulerConfig(**settings)  # type: ignore[arg-type]
        self.weights = weights
        self.counters = counters or Recording(weights)
        self.pool = BlockPool(num_blocks, 4)
        self.scheduler = Scheduler(self.config, self.pool, counters=self.counters)
        self.steps = 0
        self.theta = self.scheduler.priorities.theta
        self.gap = 0.0
        self.spread = 0.0
        self.idle = 0
        self.preempted: list[Sequence] = []
        self._extremes: dict[Pair, tuple[float, float]] = {}
        self._launched: StepPlan | None = None
        self._planned: StepPlan | None = None
        self._number = 0

    # ---- demand

    def submit(
        self, tenant: str, prompt: int, output: int, request_class: RequestClass = STANDARD
    ) -> Sequence:
        """A request whose prompt is like no other."""
        self._number += 1
        request = Request(
            f"{tenant}-{self._number}",
            (self._number,) * prompt,
            SamplingParams(max_tokens=output),
            tenant=tenant,
            request_class=request_class,
            arrival=float(self._number),
        )
        sequence = Sequence.start(request)
        self.scheduler.add(sequence)
        return sequence

    def keep_waiting(self, rng: random.Random, sizes: dict[str, tuple[int, int]]) -> None:
        """Let the tenants of ``sizes`` have requests that wait: prompt and output at most."""
        queued = Counter(sequence.request.tenant for sequence in self.scheduler.waiting)
        for tenant, (prompt, output) in sizes.items():
            for _ in range(3 - queued[tenant]):
                self.submit(tenant, rng.randint(1, prompt), rng.randint(1, output))

    # ---- steps

    def step(self) -> None:
        """End the running step, launch the next one and plan the one after it."""
        self.steps += 1
        core = self.scheduler
        self._complete()
        self.at_boundary()
        plan = self._planned or core.schedule()
        self._planned = None
        core.patch(plan)
        self.preempted += plan.preempted
        self._check_plan(plan)
        if plan.rows:
            self._launched = plan
            self._planned = core.schedule()
        elif core.waiting:
            self.idle += 1
        if self.steps % 16 == 0:
            core.check_integrity()
        self.theta = max(self.theta, core.priorities.theta)
        self._look()

    def run(self, limit: int = 20_000) -> None:
        """Step until nothing is left to do."""
        while self.scheduler.has_work() or self._launched is not None:
            limit -= 1
            assert limit > 0, "sequences starve"
            self.step()
        self.scheduler.check_integrity()
        assert self.pool.num_free == self.pool.num_usable

    def at_boundary(self) -> None:
        """What happens while no step is launched."""

    def take_out(self, sequence: Sequence) -> None:
        """As a migration does, at a boundary."""
        if self._planned is not None:
            self.scheduler.drop(self._planned, sequence)
        self.scheduler.take_out(sequence)

    def _complete(self) -> None:
        plan, self._launched = self._launched, None
        if plan is not None:
            self.scheduler.complete(plan, [9] * sum(row.samples for row in plan.rows))

    def _check_plan(self, plan: StepPlan) -> None:
        assert len(plan.rows) <= self.config.max_num_seqs
        assert plan.num_tokens <= self.config.max_num_batched_tokens
        rows = {row.sequence for row in plan.rows}
        if len(rows) < self.scheduler.max_num_seqs:
            for sequence in self.scheduler.running:
                if sequence.num_tokens - sequence.num_computed == 1:
                    assert sequence in rows, "a decode was skipped"
        for sequence in rows:
            assert sequence.status is SequenceStatus.RUNNING

    # ---- what an outsider sees

    def _look(self) -> None:
        for request_class in RequestClass:
            waiting = self.counters.waiting(request_class)
            if len(waiting) > 1:
                self.gap = max(self.gap, max(waiting.values()) - min(waiting.values()))
            self._look_at_pairs(request_class, sorted(waiting))

    def _look_at_pairs(self, request_class: RequestClass, waiting: list[str]) -> None:
        charged, weights = self.counters.charged, self.weights
        old = self._extremes
        self._extremes = {p: v for p, v in old.items() if p[0][1] is not request_class}
        for at, first in enumerate(waiting):
            for second in waiting[at + 1 :]:
                pair = (first, request_class), (second, request_class)
                level = charged[pair[0]] / weights[first] - charged[pair[1]] / weights[second]
                low, high = old.get(pair, (level, level))
                self._extremes[pair] = low, high = min(low, level), max(high, level)
                self.spread = max(self.spread, high - low)

    @property
    def increment(self) -> float:
        """Service by weight that a tenant may be given in a step at most."""
        step = service(self.config.max_num_batched_tokens, self.scheduler.max_num_seqs)
        return step / min(self.weights.values())

    @property
    def bound(self) -> float:
        """Counters of waiting tenants never lie further apart."""
        # A reading is used for so many steps, and one step runs while another is planned.
        return self.theta + self.increment * (self.config.priority_interval + 2)

    def count(self, reason: PreemptionReason) -> int:
        """Preemptions so far."""
        return self.scheduler.figures.preemptions[reason]
