"""What the next step computes, who enters the batch, and who is preempted.

One rule covers prefill, chunked prefill, decode and recompute (vLLM V1): a sequence has
``num_tokens`` and ``num_computed``, and a step lets some sequences catch up under a token
budget. Decodes come first, so none is skipped because a prefill arrived (Sarathi-Serve,
OSDI '24); then running prefills in chunks; then waiting sequences.

The engine plans one step ahead. In order, for every step i::

    plan = schedule()           # while step i runs; num_computed counts planned positions
    complete(plan_i, tokens)    # step i ended; its tokens become known
    patch(plan)                 # right before launch: what ended leaves, what came enters

Between ``complete`` and ``patch`` no step is launched, so ``take_out``, ``put_back`` and
``insert`` belong there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from types import MappingProxyType

from instance.budget import TokenBudget
from instance.config import SchedulerConfig
from instance.draft import Draft
from instance.fairness import ServiceCounters, TenantCounters, charge_work
from instance.kv.blocks import BlockPool, IntegrityError
from instance.kv.copies import CopyJob, HostSpace
from instance.kv.swap import Swap
from instance.kv.tables import BlockTables
from instance.limits import Limits
from instance.planner import Planner, PlannerFigures
from instance.priority import Priorities, recompute_cost
from instance.queues import Queues
from instance.request import (
    Account,
    FinishReason,
    Sequence,
    SequenceStatus,
    StepPlan,
    TokenLogprobs,
)
from instance.stretch import advance, steady_steps

_RUNNING = SequenceStatus.RUNNING
_WAITING = SequenceStatus.WAITING
_LOADING = SequenceStatus.LOADING
_HANDOVER = SequenceStatus.HANDOVER
_FINISHED = SequenceStatus.FINISHED
_NO_LOGPROBS: Mapping[int, TokenLogprobs] = MappingProxyType({})
_NO_ERRORS: Mapping[int, str] = MappingProxyType({})


@dataclass(slots=True)
class Emission:
    """New tokens of a sequence, in the order of their output index.

    Attributes:
        index: Output index of the first of ``tokens``.
        finish_reason: NOT_FINISHED while more will come.
        logprobs: One for each of ``tokens``, or none.
    """

    sequence: Sequence
    index: int
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] = ()


class Scheduler:
    """Owns the sequences of an instance and their blocks.

    The batch never holds more than ``max_num_seqs`` rows, nor more than
    ``max_num_batched_tokens``, so that every decode always fits the token budget.

    Args:
        config: Limits of a step.
        pool: Blocks; only the scheduler hands them to sequences.
        salt: What KV depends on besides tokens (model, dtype); roots the block hashes.
        host: Memory to which KV may be swapped; None where there is none.
        counters: Who keeps the tenants' service; None: this instance by itself.

    Attributes:
        sequences: Live sequences by request id, in whatever state.
        running: Sequences in the batch, by priority.
        waiting: The queue, by priority.
        swap: The books of KV on the host; None where there is none.
        counters: Who keeps the tenants' service.
        priorities: Ranks, and who may displace whom.
        budget: Bounds the prefill of a step; learns from the steps it is told of.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        salt: bytes = b"",
        host: HostSpace | None = None,
        counters: ServiceCounters | None = None,
    ) -> None:
        if config.max_num_seqs < 1 or config.max_num_batched_tokens < 1:
            raise ValueError("max_num_seqs and max_num_batched_tokens must be at least 1")
        if config.priority_interval < 1:
            raise ValueError("priority_interval must be at least 1")
        self.config = config
        self.pool = pool
        self.max_num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
        self.sequences: dict[str, Sequence] = {}
        host_pool = None if host is None else BlockPool(host.num_blocks, pool.block_size)
        self._tables = BlockTables(pool, salt, config.enable_prefix_caching, host_pool)
        self.budget = TokenBudget(config.max_num_batched_tokens, config.tpot_targets)
        steps = self.budget.learner
        self.swap = None if host is None else Swap(self._tables, host, steps)
        self.counters: ServiceCounters = TenantCounters() if counters is None else counters
        self.priorities = Priorities(
            self.counters,
            config.theta,
            recompute_cost if self.swap is None else self.swap.cost.swap_service,
            config.priority_interval,
            self.max_num_seqs,
        )
        self._queues = Queues(self.priorities)
        self.running, self.waiting = self._queues.running, self._queues.waiting
        self._limits = Limits(config, pool)
        self._planner = Planner(
            self._queues,
            self.sequences,
            self._tables,
            self.swap,
            self._limits,
            self.budget,
            self.max_num_seqs,
            config.priority_interval,
        )
        self._number = 0

    # ---- sequences come and go

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that holds no KV.

        Raises:
            ValueError: Its id is live already, it has no token to draw within its limits,
                or it could never fit the pool.
        """
        self._check_new(sequence)
        self.sequences[sequence.request_id] = sequence
        self._queues.wait(sequence)

    def insert(self, sequence: Sequence) -> None:
        """Run a sequence that arrived by migration, with its KV in blocks already held.

        The caller's references to the blocks become the sequence's.

        Raises:
            ValueError: As for ``add``, or its counters and blocks do not agree.
        """
        self._check_new(sequence)
        computed = sequence.num_computed
        if (
            not 0 < computed < len(sequence.tokens)
            or sequence.num_written != computed
            or sequence.num_in_flight
            or len(sequence.block_table) * self.pool.block_size < computed
        ):
            raise ValueError(
                f"{sequence.request_id}: cannot run with {len(sequence.tokens)} tokens, "
                f"{computed} computed, {sequence.num_written} written, "
                f"{sequence.num_in_flight} in flight, {len(sequence.block_table)} blocks"
            )
        self.sequences[sequence.request_id] = sequence
        self._queues.run(sequence)
        self._tables.seal(sequence)

    def abort(self, request_id: str) -> Sequence | None:
        """End a sequence in whatever state and release its blocks; None if unknown.

        A row of it in a launched step counts for nothing when that step ends.
        """
        sequence = self.sequences.get(request_id)
        if sequence is not None:
            self.finish(sequence, FinishReason.ABORT)
        return sequence

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a live sequence; its full blocks stay in the prefix cache until reused.

        For a sequence that has moved away ``reason`` is NOT_FINISHED: it goes on elsewhere.
        """
        if self.sequences.get(sequence.request_id) is not sequence:
            raise IntegrityError(f"{sequence.request_id} is not a live sequence here")
        self._queues.leave(sequence)
        self._planner.forget(sequence)
        moved = reason is FinishReason.NOT_FINISHED
        self.counters.waiting_ends(sequence.account, sequence.request_id, moved)
        del self.sequences[sequence.request_id]
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        if self.swap is not None:
            self.swap.forget(sequence)
            if reason in (FinishReason.STOP, FinishReason.LENGTH):
                self.swap.note_finished(sequence)
        self._tables.release(sequence)

    def fail(self, sequence: Sequence, error: str) -> Emission:
        """End a live sequence that cannot go on, and say so to its home."""
        sequence.error = error
        self.finish(sequence, FinishReason.ERROR)
        return Emission(sequence, sequence.num_output, (), FinishReason.ERROR)

    def take_out(self, sequence: Sequence) -> None:
        """Out of the batch or the queue, into HANDOVER; it keeps what KV it has.

        Raises:
            IntegrityError: A launched or planned step still computes or draws for it; wait
                for the step's end and ``drop`` it from the plan. Or its KV is being copied.
        """
        if not self.can_leave(sequence):
            raise IntegrityError(f"{sequence.request_id} is {sequence.status}, its KV in a copy")
        if sequence.num_in_flight or sequence.num_computed != sequence.num_written:
            raise IntegrityError(
                f"{sequence.request_id}: {sequence.num_in_flight} tokens in flight, "
                f"{sequence.num_computed} computed, {sequence.num_written} written"
            )
        self._queues.leave(sequence)
        self._planner.forget(sequence)
        sequence.status = _HANDOVER
        if not sequence.num_kept:
            self._tables.release(sequence)  # blocks of a first row that was dropped

    def can_leave(self, sequence: Sequence) -> bool:
        """No copy of its KV is under way."""
        return sequence.status is not _LOADING and not self._is_busy(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Undo ``take_out``: back into the batch with its KV, else into the queue."""
        if sequence.status is not _HANDOVER:
            raise IntegrityError(f"{sequence.request_id} is {sequence.status}, not in handover")
        if sequence.num_computed:
            self._queues.run(sequence)
        else:
            self._queues.wait(sequence)

    def grant(self, sequence: Sequence) -> None:
        """The home granted a sequence that was silent: charge what was drawn until now."""
        sequence.silent = False
        if sequence.num_output > sequence.charged_output:
            charge_work(self.counters, sequence, sequence.num_prompt, sequence.num_prompt)

    # ---- steps

    def schedule(self) -> StepPlan:
        """Plan the next step; the one before may still run.

        A row may refer to a position whose token is not known yet. Counters move as if the
        step were done: ``num_computed`` by the row's count, and ``num_in_flight`` where it
        draws.
        """
        self._number += 1
        plan = StepPlan(self._number)
        draft = Draft(plan, self.config.max_num_batched_tokens)
        self._planner.fill(draft, may_preempt=True)
        draft.finish()
        return plan

    def patch(self, plan: StepPlan) -> None:
        """Bring a plan up to date right before its launch; the step before has completed.

        Rows of sequences that ended or left are dropped; sequences that run but have no row
        get one, then waiting ones are admitted, as far as the step's limits allow. A decode
        that joins here takes its token from a planned prefill if the budget is used up. All
        tokens of the rows are known afterwards.
        """
        draft = Draft(plan, self.config.max_num_batched_tokens)
        for row in plan.rows:
            if row.sequence.status is not _RUNNING:
                draft.drop(row.sequence)
        self._planner.fill(draft, may_preempt=False)
        while self.swap is not None and self.swap.begin(self.running[-1] if self.running else None):
            if draft.rows:
                break
            # Neither a step nor a copy will end: its preemptor has to enter now.
            self._planner.fill(draft, may_preempt=False)
        draft.finish()

    def drop(self, plan: StepPlan, sequence: Sequence) -> None:
        """Take a sequence's row out of a plan that is not launched, if it has one.

        Blocks allocated for the row stay in its block table.
        """
        draft = Draft(plan, self.config.max_num_batched_tokens)
        draft.drop(sequence)
        draft.finish()

    def complete(
        self,
        plan: StepPlan,
        tokens: SequenceOf[int],
        logprobs: Mapping[int, TokenLogprobs] = _NO_LOGPROBS,
        errors: Mapping[int, str] = _NO_ERRORS,
    ) -> list[Emission]:
        """Account for a step that has ended; steps complete in the order of their launch.

        Args:
            plan: The plan as it was launched.
            tokens: The tokens drawn, one per row that samples, in the order of the rows.
            logprobs: Of the tokens whose sequences ask for them, by index in ``tokens``.
            errors: Draws that could not be made, by index in ``tokens``, and why: they end
                their sequences.

        Returns:
            The new tokens of every sequence that is still live.

        Raises:
            ValueError: There are not as many tokens as sampling rows.
        """
        draws = sum(1 for row in plan.rows if row.samples)
        if draws != len(tokens):
            raise ValueError(f"step {plan.number}: {len(tokens)} tokens for {draws} rows")
        emissions: list[Emission] = []
        decoded: dict[Account, int] = {}
        block_size, finish_reason = self.pool.block_size, self._limits.finish_reason
        following = 0
        for sequence, start, count, samples in plan.rows:
            draw = following
            following += samples
            if sequence.status is _FINISHED:
                continue
            # A sequence preempted since the launch is waiting (it cannot have returned: the
            # plan made meanwhile admits nobody). Its token is valid, its KV is gone or about
            # to leave for the host.
            if sequence.num_written == start and (
                sequence.status is _RUNNING or (self.swap and self.swap.leaves(sequence))
            ):
                sequence.num_written = start + count
            if not samples:
                self._tables.seal(sequence)
                charge_work(self.counters, sequence, start, start + count)
                continue
            index = sequence.num_output
            sequence.num_in_flight -= 1
            if draw in errors:
                charge_work(self.counters, sequence, start, start + count)
                emissions.append(self.fail(sequence, errors[draw]))
                continue
            sequence.tokens.append(tokens[draw])
            figures: tuple[TokenLogprobs, ...] = ()
            if draw in logprobs:
                figures = (logprobs[draw],)
                sequence.logprobs.append(logprobs[draw])
            if count == 1 and index and index == sequence.charged_output and not sequence.silent:
                sequence.charged_output = index + 1  # as nearly always: charged together below
                decoded[sequence.account] = decoded.get(sequence.account, 0) + 1
            else:
                charge_work(self.counters, sequence, start, start + count)
            if sequence.num_written // block_size > sequence.sealed:
                self._tables.seal(sequence)
            reason = finish_reason(sequence)
            if reason:
                self.finish(sequence, reason)
            emissions.append(Emission(sequence, index, (tokens[draw],), reason, figures))
        for account, number in decoded.items():
            self.counters.charge(account, 0, number)
        if self.swap is not None:
            self.swap.begin(self.running[-1] if self.running else None)
        return emissions

    def end_copy(self, job: CopyJob, result: float | BaseException) -> None:
        """A copy has ended, in so many seconds or with an error."""
        assert self.swap is not None
        failed = self.swap.end(job, result)
        if failed is not None:
            self._queues.wait(failed)

    # ---- many steps at once

    def steady_steps(self, launched: StepPlan, planned: StepPlan, most: int) -> int:
        """How many steps, at most ``most``, will all be decodes of the present batch, as long
        as nothing comes in between and no token drawn ends a sequence.

        Args:
            launched: The plan that runs.
            planned: The one after it.
        """
        if self.waiting:
            most = min(most, self._planner.closed_for(planned.number))
        spare = 0
        if self.swap is not None:
            if not self.swap.quiet:
                return 0
            spare = self.swap.short_below
            if self.pool.num_free < spare and self.running:
                most, spare = min(most, self.swap.saved_for(self.running[-1])), 0
        return steady_steps(
            launched, planned, self.running, self._limits, self._tables, most, spare
        )

    def advance_decodes(
        self,
        launched: StepPlan,
        planned: StepPlan,
        steps: int,
        tokens: SequenceOf[SequenceOf[int]],
    ) -> None:
        """Do what ``complete``, ``patch`` and ``schedule`` would for so many steps.

        Args:
            launched: The plan that runs; becomes the one that runs then.
            planned: The one after it; likewise.
            steps: At most ``steady_steps``; none of them ends a sequence.
            tokens: What each row of ``launched`` draws in these steps.
        """
        charged: dict[Account, int] = {}
        for sequence, *_ in launched.rows:
            if not sequence.silent:
                sequence.charged_output += steps
                charged[sequence.account] = charged.get(sequence.account, 0) + steps
        for account, number in charged.items():
            self.counters.charge(account, 0, number)
        advance(launched, planned, self.running, self._tables, steps, tokens)
        self._number += steps

    # ---- figures and checks

    @property
    def figures(self) -> PlannerFigures:
        """What was preempted and paused so far."""
        return self._planner.figures

    @property
    def num_blocked(self) -> int:
        """Running sequences that the last plan left out since the blocks they need are still
        being copied from."""
        return self._planner.num_blocked

    def is_paused(self, sequence: Sequence) -> bool:
        """It is in the batch, but its prefill stands still for one further behind."""
        return self._planner.paused(sequence)

    def has_work(self) -> bool:
        """Something runs or waits; sequences in handover are not work."""
        return bool(self.running or self.waiting or self._planner.num_loading)

    def waiting_blocks(self) -> int:
        """Blocks that the waiting sequences want for their known tokens."""
        return sum(self._tables.blocks_for(len(sequence.tokens)) for sequence in self.waiting)

    def check_integrity(self, held: Mapping[int, int] | Iterable[int] = ()) -> None:
        """Check sequences, queues and pool against each other.

        Args:
            held: References to held blocks outside the scheduler's sequences (an incoming
                migration's prefix hits and committed blocks): counts by block, or block ids,
                one per reference. Reserved blocks have none.

        Raises:
            IntegrityError: With what is wrong.
        """
        refs: Counter[int] = Counter(held)
        for request_id, sequence in self.sequences.items():
            refs.update(sequence.block_table)
            status = sequence.status
            queue = {_RUNNING: self.running, _WAITING: self.waiting, _HANDOVER: None}.get(status)
            if (
                status is SequenceStatus.FINISHED
                or (status is _LOADING and self.swap is None)
                or (queue is not None and sequence not in queue)
            ):
                raise IntegrityError(f"{request_id} is {status} but not in its queue")
            room = len(sequence.block_table) * self.pool.block_size
            computed, written = sequence.num_computed, sequence.num_written
            if not 0 <= written <= computed <= min(room, sequence.num_tokens):
                raise IntegrityError(
                    f"{request_id}: {written} written, {computed} computed of "
                    f"{sequence.num_tokens} tokens in room for {room}"
                )
            leaves = self.swap is not None and self.swap.leaves(sequence)
            if status is _WAITING and (sequence.block_table or computed) and not leaves:
                raise IntegrityError(f"{request_id} is waiting but holds KV")
        for name, queue in (("running", self.running), ("waiting", self.waiting)):
            for sequence in queue:
                if self.sequences.get(sequence.request_id) is not sequence:
                    raise IntegrityError(f"{sequence.request_id} is {name} but not live")
        self._queues.check_order()
        if sum(1 for s in self.sequences.values() if s.status is not _HANDOVER) != (
            len(self.running) + len(self.waiting) + self._planner.num_loading
        ):
            raise IntegrityError("a sequence is queued twice")
        self.pool.check_integrity(refs)
        if self.swap is not None:
            self.swap.check_integrity(self.sequences.values())

    # ---- small parts

    def _is_busy(self, sequence: Sequence) -> bool:
        return self.swap is not None and self.swap.busy(sequence)

    def _check_new(self, sequence: Sequence) -> None:
        if sequence.request_id in self.sequences:
            raise ValueError(f"request {sequence.request_id} is already here")
        self._limits.check(sequence)
