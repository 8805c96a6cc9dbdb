"""The instance's own step loop, on a device that only takes time.

``SimulatedEngine`` is ``instance.engine.Engine`` with two differences. A step has no arrays:
its duration follows from how many positions its rows have. And a run of steps in which
nothing but decoding happens is *one* event on the clock: the scheduler accounts for all its
steps at once, at its end or when something comes in between.
"""

from __future__ import annotations

import itertools
import operator
from bisect import bisect_right
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Protocol

import numpy as np

from cluster.simulation.answers import Answers
from cluster.simulation.scatter import Pace
from instance.budget import StepShape
from instance.clock import TimerHandle, VirtualClock
from instance.config import EngineConfig
from instance.engine import Engine, StepListener
from instance.executor import StepResult
from instance.fairness import ServiceCounters, service
from instance.kv.copies import CopyJob
from instance.model.modelled import ModelledExecutor
from instance.request import Account, Sequence, StepPlan
from instance.step_cost import StepCost

DecodeListener = Callable[[SequenceOf[Sequence], SequenceOf[float]], None]
"""Told the sequences that drew one token at each of the times given."""

LONGEST_STRETCH = 48
"""Steps in one stretch at most: their ends are computed ahead, in vain where something comes
in between."""


class Counters(ServiceCounters, Protocol):
    """Counters of which some charges have to be told at once."""

    def left(self, account: Account) -> float:
        """What may be charged before that; infinite where nobody is told."""


class SimulatedEngine(Engine):
    """An engine whose steps are durations on a virtual clock.

    Whoever touches the scheduler, the pool or a sequence from outside a step calls
    ``interrupt`` first; who only reads calls ``catch_up``.

    Args:
        executor: Says what model and pool there are; it launches nothing.
        config: Settings of the instance.
        clock: The virtual clock.
        cost: Durations of steps.
        answers: Tokens that are drawn.
        on_step: As for ``Engine``.
        on_decodes: Told the steps that were accounted for together, instead of ``on_step``.
        on_failure: As for ``Engine``.
        on_preempted: As for ``Engine``.
        counters: The instance's share of the cluster's ledger.
        jumps: Account for steps together where nothing else can happen.
        on_prefill: Told each sequence of whose prompt a step begins to compute some.
        pace: How durations scatter; None: not at all.
        awaited: Whether somebody has to be told of the running step's end.
    """

    def __init__(
        self,
        executor: ModelledExecutor,
        config: EngineConfig,
        clock: VirtualClock,
        cost: StepCost,
        answers: Answers,
        on_step: StepListener,
        on_decodes: DecodeListener,
        on_failure: Callable[[BaseException], None],
        on_preempted: Callable[[Sequence], None],
        counters: Counters,
        jumps: bool = True,
        on_prefill: Callable[[Sequence], None] = lambda sequence: None,
        pace: Pace | None = None,
        awaited: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(
            executor,
            config,
            clock,
            self._soon,
            on_step,
            on_failure,
            on_preempted,
            counters,
        )
        self.jumps = jumps
        self._virtual = clock
        self.jumped = 0
        self._cost = cost
        self._end = operator.add if pace is None else pace.end
        self._counters = counters
        self._answers = answers
        self._on_decodes = on_decodes
        self._on_prefill = on_prefill
        self._awaited = awaited
        self._timer: TimerHandle | None = None
        self._ends_at = 0.0
        # Ends of the running step and of those that may follow it, and how many of them the
        # scheduler has been told of.
        self._ends: list[float] = []
        self._told = 0
        # What each sequence draws in the stretch, and what a step of it charges.
        self._drawn: dict[Sequence, SequenceOf[int]] = {}
        self._charges: list[tuple[Account, float]] = []

    def _soon(self, call: Callable[[], None]) -> None:
        self._virtual.call_later(0.0, call)

    def stop(self) -> None:
        """The instance is dead: nothing of it happens any more."""
        self.failed = True
        if self._timer is not None:
            self._timer.cancel()

    def _finish_copy(self, job: CopyJob, result: float | BaseException) -> None:
        if not self.failed:
            self.interrupt()
            super()._finish_copy(job, result)

    # ---- steps

    def _launch(self, plan: StepPlan) -> None:
        self._ends_at = self._end(self._clock.now(), self._cost.of(*StepShape.of(plan)))
        self._timer = self._virtual.call_at(self._ends_at, self._step_over)
        # Decodes come first in a plan.
        for sequence, start, length, _ in reversed(plan.rows):
            if start < sequence.num_prompt:
                self._on_prefill(sequence)
            elif length == 1:
                break

    def _advance(self) -> None:
        if self.failed:
            return
        super()._advance()
        self.resume()

    def resume(self) -> None:
        """After an ``interrupt``, and what it was for: the next steps may be known again."""
        running, planned = self._running, self._planned
        if (
            self.jumps
            and running is not None
            and planned is not None
            and not (self._ends or self._at_boundary or self._released_since_launch)
            and not self._awaited()
        ):
            self._begin_stretch(running, planned)

    def _begin_stretch(self, running: StepPlan, planned: StepPlan) -> None:
        """See how far the next steps are known, and let the last of them end the stretch."""
        count = len(self.scheduler.running)
        # Decodes come first in a plan.
        if len(running.rows) != count or len(planned.rows) != count or running.rows[-1].length > 1:
            return
        ends_at, steps = self._answers.ends_at, LONGEST_STRETCH
        for sequence, start, _, _ in running.rows:
            # The step that draws the last token of an answer is the last of the stretch.
            left = ends_at(sequence) - start - 2
            if left < steps:
                steps = left
            # The last position of a prompt may be a row alone, and is charged as what it is.
            if steps < 1 or sequence.silent or start < sequence.num_prompt:
                return
        rows: dict[Account, int] = {}
        for row in running.rows:
            account = row.sequence.account
            rows[account] = rows.get(account, 0) + 1
        self._charges = [(account, service(0, number)) for account, number in rows.items()]
        steps = min(steps, self._steps_within_leases())
        if steps > 0:
            steps = self.scheduler.steady_steps(running, planned, steps)
        if steps < 1:
            return
        context = count + sum([start for _, start, _, _ in running.rows])
        at = self._ends_at
        self._ends = [at, *self._cost.decodes_end(at, count, context + count, steps, self._end)]
        self._told = 0
        tokens = self._answers.tokens
        self._drawn = {
            one: tokens(one.request.request_id, start + 1 - one.num_prompt, steps)
            for one, start, _, _ in running.rows
        }
        self._set_timer(self._ends[-1])

    def _steps_within_leases(self) -> int:
        """Steps that can end before the one that uses up a lease, which is reported at once."""
        left = min(self._counters.left(account) / each for account, each in self._charges)
        return LONGEST_STRETCH if left > LONGEST_STRETCH else int(left) - 1

    def leases_changed(self) -> None:
        """What may be charged unreported is another sum than when the stretch began."""
        if self._ends:
            ahead = len(self._ends) - 1 - self._told
            if ahead > self._steps_within_leases():
                self.interrupt()

    def _set_timer(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._virtual.call_at(at, self._step_over)

    def catch_up(self) -> None:
        """Account for the steps of a stretch that have ended by now."""
        if self._ends:
            # The last one ends like any other step, by its timer.
            ended = bisect_right(self._ends, self._clock.now(), self._told, len(self._ends) - 1)
            if ended > self._told:
                self._account(ended - self._told)

    def interrupt(self) -> None:
        """Something is about to happen here: the running step is the last that is known."""
        if self._ends:
            self.catch_up()
            self._ends_at = self._ends[self._told]
            if self._told < len(self._ends) - 1:
                self._set_timer(self._ends_at)
            self._ends = []

    def _account(self, steps: int) -> None:
        running, planned = self._running, self._planned
        assert running is not None
        assert planned is not None
        first, end = self._told, self._told + steps
        times = self._ends[first:end]
        seconds = [end - begin for begin, end in itertools.pairwise((self._launched_at, *times))]
        # Of steps in a row that only decode, no more than the first is learned from.
        self.scheduler.budget.observe(running, seconds[0])
        if self.scheduler.swap is not None:
            self.scheduler.swap.cost.observe_decodes(running.rows, seconds)
        sequences = [row.sequence for row in running.rows]
        drawn = self._drawn
        self.scheduler.advance_decodes(
            running, planned, steps, [drawn[one][first:end] for one in sequences]
        )
        # Whoever is told of the first tokens may ask what a step takes, the first one included.
        self._recent.append(seconds[0])
        self._on_decodes(sequences, times)
        self._told = end
        self.steps += steps
        self.jumped += steps
        self._recent.extend(seconds[1:])
        for one in seconds:
            self.step_seconds_total += one
            self.model_seconds += one
        self._launched_at = times[-1]

    def _step_over(self) -> None:
        """The running step, or the last one of the stretch, has ended."""
        self.catch_up()
        self._ends = []
        plan = self._running
        assert plan is not None
        answers = self._answers
        drawn = [
            answers.token(sequence.request.request_id, start + length - sequence.num_prompt)
            for sequence, start, length, samples in plan.rows
            if samples
        ]
        seconds = self._clock.now() - self._launched_at
        self._complete(StepResult(np.array(drawn, np.int64), seconds, seconds))
