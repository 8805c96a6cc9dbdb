"""The step loop of an instance: plans step i + 1 while step i runs.

The loop is a chain of callbacks on one thread, so it runs unchanged on an event loop (a
server) and on a virtual clock (the simulator). Only the executor works elsewhere, and it
is given arrays, never the loop's own objects.

At a *boundary* no step is launched: the last one has been completed, the next one not yet
started. Whatever hands KV blocks to a writer outside the step (a reservation for an
incoming migration, a copy from the host) or takes a sequence out of the batch happens there,
so that no launched step can still touch those blocks. Copies to and from the host are issued
there too; steps go on beside them, unless waiting for one is measured to be cheaper.

Where the executor can feed the tokens that a step draws to the next one, that one is launched
while the step runs, so that the device never waits for the loop. A boundary then comes when
something asks for one: nothing is launched ahead of a call that waits for it, of copies, or of
a draw that needs the tokens before it on the host.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import NamedTuple

from instance.clock import Clock
from instance.config import EngineConfig
from instance.executor import Executor, KvPool, StepBatch, StepResult
from instance.fairness import ServiceCounters
from instance.kv.blocks import BlockPool
from instance.kv.copies import CopyJob, HostSpace
from instance.request import FinishReason, Row, Sequence, SequenceStatus, StepPlan
from instance.scheduler import Emission, Scheduler

StepListener = Callable[[list[Emission]], None]


class KvPlace(NamedTuple):
    """Where the KV of a sequence is.

    Attributes:
        pool: Accounts for its blocks.
        kv: Their bytes; None where there are none (a modelled executor).
        table: Its blocks there, in order.
    """

    pool: BlockPool
    kv: KvPool | None
    table: list[int]


class Engine:
    """Scheduler and executor of one model replica.

    Args:
        executor: Runs the steps.
        config: Instance settings.
        clock: Monotonic time for measurements.
        post: Runs a callable on the loop's thread, from any thread.
        on_step: Told the new tokens of each step, while the next step runs already.
        on_failure: Told once when the executor failed; the engine then stays stopped.
        on_preempted: Told each sequence that lost its KV.
        counters: Who keeps the tenants' service; None: this instance by itself.
    """

    def __init__(
        self,
        executor: Executor,
        config: EngineConfig,
        clock: Clock,
        post: Callable[[Callable[[], None]], None],
        on_step: StepListener,
        on_failure: Callable[[BaseException], None],
        on_preempted: Callable[[Sequence], None] = lambda _: None,
        counters: ServiceCounters | None = None,
    ) -> None:
        model = executor.description
        self.model = model
        self.executor = executor
        self.pool = BlockPool(executor.num_blocks, model.block_size)
        self.salt = model.kv_salt
        limits = dataclasses.replace(
            config.scheduler,
            max_model_len=min(config.scheduler.max_model_len, model.max_model_len),
        )
        copier = executor.copier
        host = None
        if copier is not None:
            host = HostSpace(copier.num_host_blocks, copier.block_bytes, config.swap)
        self.scheduler = Scheduler(limits, self.pool, self.salt, host, counters)
        self.prefix_caching = limits.enable_prefix_caching
        self.steps = 0
        self.failed = False
        self.model_seconds = 0.0
        self.step_seconds_total = 0.0
        self._clock = clock
        self._post = post
        self._on_step = on_step
        self._on_failure = on_failure
        self._on_preempted = on_preempted
        self._told_preempted = 0
        self._running: StepPlan | None = None
        # Launched behind the running one.
        self._ahead: StepPlan | None = None
        self._planned: StepPlan | None = None
        self._at_boundary: collections.deque[Callable[[], None]] = collections.deque()
        self._emissions: list[Emission] = []
        self._recent: collections.deque[float] = collections.deque(maxlen=32)
        self._launched_at = 0.0
        self._stalled_at: float | None = None
        self._released_since_launch = False
        self._advancing = False

    @property
    def step_seconds(self) -> float:
        """Median duration of recent steps in seconds; 0 before the first."""
        return statistics.median(self._recent) if self._recent else 0.0

    @property
    def busy(self) -> bool:
        """A step is running."""
        return self._running is not None

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence; raises ValueError if it can never fit."""
        self.scheduler.add(sequence)
        self._prepare(sequence)
        self.wake()

    def abort(self, request_id: str) -> Sequence | None:
        """End a sequence at once; a row of it in the running step counts for nothing."""
        sequence = self.scheduler.abort(request_id)
        self._released_since_launch = True
        self.wake()
        return sequence

    def insert(self, sequence: Sequence) -> None:
        """Run a sequence that arrived with its KV; raises ValueError if it cannot."""
        self.scheduler.insert(sequence)
        self._prepare(sequence)
        self.wake()

    def put_back(self, sequence: Sequence) -> None:
        """Undo ``detach``."""
        self.scheduler.put_back(sequence)
        if sequence.held:
            self._prepare(sequence)
        self.wake()

    def forget(self, sequence: Sequence) -> None:
        """Drop this very sequence, if it is still live here; its blocks become cached."""
        if self.scheduler.sequences.get(sequence.request_id) is sequence:
            self.scheduler.finish(sequence, FinishReason.NOT_FINISHED)
            self._released_since_launch = True
            self.wake()

    def at_boundary(self, call: Callable[[], None]) -> None:
        """Run ``call`` when no step is launched: now if idle, else after the running step."""
        self._at_boundary.append(call)
        self.wake()

    def when_blocks_are_safe(self, call: Callable[[], None]) -> None:
        """Run ``call`` when no launched step can touch a free block: now, or at a boundary.

        Blocks that were free when the running step was launched are not in it; only those
        released since then may still be written by it.
        """
        if self._running is not None and self._released_since_launch:
            self.at_boundary(call)
        else:
            call()

    def detach(self, sequence: Sequence, detached: Callable[[bool], None]) -> None:
        """Take a sequence out of the batch at the next boundary and call ``detached``.

        ``detached(False)`` says that it had finished meanwhile, or that its KV is being copied
        to or from the host; it stays where it is.
        """

        def take_out() -> None:
            live = self.scheduler.sequences.get(sequence.request_id) is sequence
            if not live or self.failed or not self.scheduler.can_leave(sequence):
                detached(False)
                return
            if self._planned is not None:
                self.scheduler.drop(self._planned, sequence)
            self.scheduler.take_out(sequence)
            detached(True)

        self.at_boundary(take_out)

    def kv_of(self, sequence: Sequence) -> KvPlace:
        """Where the KV that a sequence has is: on the host while it is swapped out."""
        swap, copier = self.scheduler.swap, self.executor.copier
        if sequence.num_swapped and swap is not None and copier is not None:
            return KvPlace(swap.host, copier.host, sequence.host_table)
        return KvPlace(self.pool, self.executor.kv, sequence.block_table)

    def wake(self) -> None:
        """Start a step if none runs and there is something to do."""
        if self._running is None and not self._advancing and not self.failed:
            self._advancing = True
            self._post(self._advance)

    def _prepare(self, sequence: Sequence) -> None:
        """Hold a sequence with a grammar until the executor has that ready, so that no step
        of the others waits for it."""
        grammar = sequence.request.params.grammar
        if grammar is None:
            return
        sequence.held = True
        self.executor.prepare(
            grammar, lambda error: self._post(lambda: self._prepared(sequence, error))
        )

    def _prepared(self, sequence: Sequence, error: str) -> None:
        live = self.scheduler.sequences.get(sequence.request_id) is sequence
        # In handover it may not end here; if it comes back, it is prepared again.
        if not live or not sequence.held or sequence.status is SequenceStatus.HANDOVER:
            return
        if error:
            self._on_step([self.scheduler.fail(sequence, error)])
        else:
            sequence.held = False
        self.wake()

    def _advance(self) -> None:
        """At a boundary: start the next step, then tell the last one's tokens and plan on."""
        try:
            if self._at_boundary:
                # A sequence about to leave must not take its last tokens' time with it.
                self._tell_emissions()
            while self._at_boundary:
                self._at_boundary.popleft()()
            plan = self._planned or self._plan()
            self._planned = None
            self.scheduler.patch(plan)
            self._tell_preempted(plan)
            self._issue_copies()
            if self._held_back(plan):
                self._planned = plan if plan.rows else None
            elif plan.rows:
                self._running = plan
                self._released_since_launch = False
                self._launched_at = self._clock.now()
                self._note_returned(plan)
                self._launch(plan)
        finally:
            self._advancing = False
        self._tell_emissions()
        if self._running is not None:
            self._plan_on()

    def _plan_on(self) -> None:
        """Plan the next step while one runs, and launch it behind that one where possible."""
        plan = self._planned = self._plan()
        if self._running is not None and self._may_go_ahead(plan):
            self._planned, self._ahead = None, plan
            self._note_returned(plan)
            batch = StepBatch.build(plan, self.pool.block_size, self._running)
            self.executor.launch(batch, self._step_ended)

    def _may_go_ahead(self, plan: StepPlan) -> bool:
        swap = self.scheduler.swap
        return (
            self.executor.feeds_back
            and bool(plan.rows)
            and not plan.preempted
            and not self._at_boundary
            and (swap is None or swap.quiet)
            and not any(_needs_tokens(row) for row in plan.rows)
        )

    def _launch(self, plan: StepPlan) -> None:
        """Start a plan whose tokens are all known; the simulator's engine has no batch."""
        self.executor.launch(StepBatch.build(plan, self.pool.block_size), self._step_ended)

    # ---- copies to and from the host

    def _issue_copies(self) -> None:
        """Hand the copies that were begun to the copier; no step is launched."""
        swap, copier = self.scheduler.swap, self.executor.copier
        if swap is None or copier is None:
            return
        for job in swap.copies.take_begun():
            done = functools.partial(self._copy_ended, job)
            try:
                (copier.copy_out if job.outward else copier.copy_in)(job.runs, done)
            except Exception as error:
                done(error)

    def _copy_ended(self, job: CopyJob, result: float | BaseException) -> None:
        self._post(lambda: self._finish_copy(job, result))

    def _finish_copy(self, job: CopyJob, result: float | BaseException) -> None:
        self.scheduler.end_copy(job, result)
        self._tell_lost()
        self.wake()

    def _tell_lost(self) -> None:
        swap = self.scheduler.swap
        if swap is not None and swap.lost:
            lost, swap.lost = swap.lost, []
            for sequence in lost:
                self._on_preempted(sequence)

    def _held_back(self, plan: StepPlan) -> bool:
        """Whether this boundary lasts until a copy has ended; counts the time that it does."""
        swap = self.scheduler.swap
        if swap is None:
            return False
        now = self._clock.now()
        elapsed = 0.0 if self._stalled_at is None else now - self._stalled_at
        held = swap.must_wait(
            self.step_seconds, len(plan.rows), self.scheduler.num_blocked, elapsed
        )
        if held or (not plan.rows and swap.awaited):
            if self._stalled_at is None:
                self._stalled_at = now
        elif self._stalled_at is not None:
            self._stalled_at = None
            if plan.rows:
                swap.figures.stalls += 1
                swap.figures.stall_seconds += elapsed
        return held

    def _note_returned(self, plan: StepPlan) -> None:
        """Count the time that preemptions took from the sequences of a plan."""
        for sequence, *_ in plan.rows:
            if sequence.preempted_at is not None:
                seconds = self._launched_at - sequence.preempted_at
                sequence.seconds_lost += seconds
                sequence.preempted_at = None
                if self.scheduler.swap is not None:
                    self.scheduler.swap.figures.returned(seconds)

    # ---- telling

    def _tell_emissions(self) -> None:
        emissions, self._emissions = self._emissions, []
        if emissions:
            self._on_step(emissions)

    def _plan(self) -> StepPlan:
        plan = self.scheduler.schedule()
        self._told_preempted = 0
        self._tell_preempted(plan)
        return plan

    def _tell_preempted(self, plan: StepPlan) -> None:
        told, self._told_preempted = self._told_preempted, len(plan.preempted)
        for sequence in plan.preempted[told:]:
            self._released_since_launch = True
            if sequence.preempted_at is None:
                sequence.preempted_at = self._clock.now()
            self._on_preempted(sequence)
        self._tell_lost()

    def _step_ended(self, result: StepResult | BaseException) -> None:
        self._post(lambda: self._complete(result))

    def _complete(self, result: StepResult | BaseException) -> None:
        plan = self._running
        if plan is None and self.failed:
            return  # a step that was launched behind the one that failed
        assert plan is not None
        self._running, self._ahead = self._ahead, None
        if isinstance(result, BaseException):
            self._running = None
            self.failed = True
            self._on_failure(result)
            return
        self.steps += 1
        self._recent.append(self._clock.now() - self._launched_at)
        self.step_seconds_total += self._recent[-1]
        self.model_seconds += result.model_duration
        self.scheduler.budget.observe(plan, self._recent[-1])
        if self.scheduler.swap is not None:
            self.scheduler.swap.cost.observe_step(plan.rows, result.duration)
        self._emissions.extend(
            self.scheduler.complete(plan, result.tokens.tolist(), result.logprobs, result.errors)
        )
        if self._running is None:
            self._advancing = True
            self._advance()
            return
        # What has been released just now may be written by the step that runs already.
        self._released_since_launch = True
        self._launched_at = self._clock.now()
        self._tell_emissions()
        self._plan_on()


def _needs_tokens(row: Row) -> bool:
    """Its draw depends on a token that is not known yet, besides the one that it computes."""
    params = row.sequence.request.params
    restricted = params.penalizes or params.grammar is not None
    return restricted and row.samples and row.sequence.num_in_flight > 1
