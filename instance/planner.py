"""Who gets a row in the next step: decodes, prefills, newcomers, and whom they displace.

Decodes go first and only memory can stop one. Prefills share what is left of the budget,
then waiting sequences enter strictly by rank. One that does not fit preempts those it is
entitled to displace, if that suffices; the room is then kept for it, and a step that
preempted admits nobody else, so that a victim never returns before its preemptor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from instance.budget import TokenBudget
from instance.draft import Draft
from instance.kv.swap import Swap
from instance.kv.tables import BlockTables
from instance.limits import Limits
from instance.priority import PreemptionReason
from instance.queues import Queues
from instance.request import RequestClass, Sequence, SequenceStatus

_RUNNING = SequenceStatus.RUNNING
_WAITING = SequenceStatus.WAITING


@dataclass(slots=True)
class PlannerFigures:
    """Counts since the start of the instance.

    Attributes:
        preemptions: By reason.
        pauses: Times that a running prefill began to stand still for one further behind.
        paused: Prefills that stand still now.
    """

    preemptions: Counter[PreemptionReason] = field(default_factory=Counter)
    pauses: int = 0
    paused: int = 0


class Planner:
    """Fills drafts of steps with rows.

    Args:
        queues: The batch and the queue.
        sequences: All live sequences by request id.
        tables: Block tables; only the planner and its scheduler change them.
        swap: KV on the host; None where there is none.
        limits: Where sequences end.
        budget: Bounds prefill.
        max_num_seqs: Of the batch.
        interval: Steps between two readings of the priorities.

    Attributes:
        figures: What was preempted and paused so far.
        num_blocked: Running sequences that the last plan left out since the blocks they need
            are still being copied from.
    """

    def __init__(
        self,
        queues: Queues,
        sequences: Mapping[str, Sequence],
        tables: BlockTables,
        swap: Swap | None,
        limits: Limits,
        budget: TokenBudget,
        max_num_seqs: int,
        interval: int,
    ) -> None:
        self.figures = PlannerFigures()
        self.num_blocked = 0
        self._queues = queues
        self._running = queues.running
        self._waiting = queues.waiting
        self._priorities = queues.priorities
        self._sequences = sequences
        self._tables = tables
        self._swap = swap
        self._limits = limits
        self._budget = budget
        self._max_num_seqs = max_num_seqs
        self._interval = interval
        self._read_due = 0
        self._paused: set[Sequence] = set()
        self._promised: Sequence | None = None
        # Whoever could not enter, whoever it displaced: not tried again before the next
        # reading of the priorities.
        self._hopeless: Sequence | None = None

    @property
    def num_loading(self) -> int:
        """Sequences on their way into the batch."""
        return 0 if self._swap is None else self._swap.num_loading

    def paused(self, sequence: Sequence) -> bool:
        """It is in the batch, but its prefill stands still."""
        return sequence in self._paused

    def forget(self, sequence: Sequence) -> None:
        """The sequence has left the batch and the queue."""
        self._paused.discard(sequence)
        if self._promised is sequence:
            self._promised = None
        if self._hopeless is sequence:
            self._hopeless = None

    def closed_for(self, number: int) -> int:
        """After plan ``number``, plans in which nobody can enter or displace another, as long as
        the batch only decodes; 0 where that is not certain."""
        if self._paused or self.num_loading or self._promised is not None:
            return 0
        entrant = self._next()
        if entrant is None or entrant is not self._hopeless or entrant.num_in_flight:
            return 0
        # What it lacks can only grow, and it is not tried again before the next reading.
        blocks, seats = self._lack(entrant)
        return max(0, self._read_due - number - 1) if blocks > 0 or seats > 0 else 0

    def fill(self, draft: Draft, may_preempt: bool) -> None:
        """Give rows to all that have none yet, as far as the step's limits allow.

        Args:
            may_preempt: A waiting sequence may displace running ones.
        """
        self.num_blocked = 0
        if self._waiting or self.num_loading:
            self._read_priorities(draft)
        self._enter_loaded(draft, may_preempt)
        behind = self._decode(draft)
        back = self._held_back(behind)
        self._prefill(draft, [one for one in behind if one not in back])
        # While a step runs, one that lost its KV to this plan must not come back in it. Right
        # before a launch it may, so that an empty plan does not wait for a step that never
        # ends.
        preempted = bool(draft.plan.preempted) and (may_preempt or bool(draft.rows))
        self._admit(draft, may_preempt or not draft.rows, preempted)
        if back:
            back = {one for one in back if one.status is _RUNNING}
            still = self._held_back(back) if draft.rows else set()
            self._prefill(draft, [one for one in behind if one in back - still])
            back = still
        if back or self._paused:
            self._pause(back)
        if self._waiting and draft.prefills:
            # A prefill may even out or open a gap that takes many decodes.
            self._read_due = min(self._read_due, draft.plan.number + 1)

    # ---- sequences that run

    def _decode(self, draft: Draft) -> list[Sequence]:
        """Rows for those with one position to compute; returns those with more."""
        behind: list[Sequence] = []
        rows, most, size = draft.rows, self._max_num_seqs, self._tables.pool.block_size
        for sequence in self._running[:]:
            if sequence in rows or sequence.status is not _RUNNING or sequence.held:
                continue
            computed = sequence.num_computed
            remaining = len(sequence.tokens) + sequence.num_in_flight - computed
            if remaining > 1:
                behind.append(sequence)
            elif (
                remaining == 1
                and not self._limits.is_last(sequence)
                and len(rows) < most
                and (draft.budget > 0 or draft.make_room())
                and (computed < len(sequence.block_table) * size or self._grow(draft, sequence, 1))
            ):
                draft.put(sequence, 1)
        return behind

    def _prefill(self, draft: Draft, behind: Iterable[Sequence]) -> None:
        """Rows for running prefills, in chunks."""
        for sequence in behind:
            if sequence.status is not _RUNNING:
                continue  # preempted by another's growth
            self._bound(draft, sequence, sequence.num_computed)
            if draft.budget <= 0 or len(draft.rows) >= self._max_num_seqs:
                break
            count = min(sequence.num_tokens - sequence.num_computed, draft.budget)
            if self._grow(draft, sequence, count):
                draft.put(sequence, count)

    def _bound(self, draft: Draft, first: Sequence, start: int) -> None:
        """Before the first prefill: bound the step's by what its decodes can bear."""
        if draft.bounded or not self._budget.learned:
            return
        draft.bounded = True
        decodes = context = held = 0
        classes: set[RequestClass] = set()
        for sequence, at, length, _ in draft.rows.values():
            if length == 1:
                decodes += 1
                context += at + 1
                classes.add(sequence.account[1])
            else:
                held += length
        allowed = self._budget.allow(decodes, context, classes, start, first.account[1])
        draft.budget = min(draft.budget, allowed - held)

    def _held_back(self, behind: Collection[Sequence]) -> set[Sequence]:
        """Running prefills over which the next waiting sequence goes, if it can enter."""
        if not behind:
            return set()
        entrant = self._next()
        if entrant is None:
            return set()
        entitled = self._priorities.entitled
        back = {one for one in behind if entitled(entrant, one) is not None}
        return back if back and self._can_enter(entrant) else set()

    def _pause(self, back: set[Sequence]) -> None:
        """These prefills, and no others, stand still; their requests wait meanwhile."""
        counters = self._priorities.counters
        for sequence in back - self._paused:
            self.figures.pauses += 1
            counters.waiting_begins(sequence.account, sequence.request_id)
        for sequence in self._paused - back:
            if sequence.status is _RUNNING:
                counters.waiting_ends(sequence.account, sequence.request_id)
        self._paused = back
        self.figures.paused = len(back)

    # ---- sequences that enter

    def _admit(self, draft: Draft, may_preempt: bool, preempted: bool) -> None:
        """Waiting sequences enter strictly in order: a head that does not fit yet waits.

        Held ones, and those whose KV is in a copy, are passed over. After a preemption only
        those enter for whom it was made.
        """
        promised, self._promised = self._promised, None
        if promised is not None and promised.status is _WAITING:
            if not self._enter(draft, promised, True) and self._room_comes(promised):
                self._promised = promised
                return
            preempted = preempted or promised.status is not _WAITING
        if preempted:
            return
        at = 0
        while at < len(self._waiting):
            sequence = self._waiting[at]
            if sequence.held or self._is_busy(sequence):
                at += 1
                continue
            if not preempted and self._enter(draft, sequence):
                at = 0  # the order may have changed
                continue
            if sequence in draft.plan.preempted or not may_preempt:
                break
            if not self._make_way(draft, sequence):
                break
            preempted = True
            if not self._enter(draft, sequence, True):
                self._promised = sequence
                break

    def _enter(self, draft: Draft, sequence: Sequence, reserved: bool = False) -> bool:
        """Let a waiting sequence into the batch if there is room for it now.

        A swapped-out one may be fetched ahead of a place in the batch.

        Args:
            reserved: Others made way for it: if need be it gets a token of a prefill's.
        """
        entering = len(self._running) + self.num_loading
        full = entering >= self._max_num_seqs or len(draft.rows) >= self._max_num_seqs
        if not full:
            self._bound(draft, sequence, 0)
        ahead = full or (draft.budget <= 0 and not reserved)
        if ahead and not (sequence.num_swapped and entering <= self._max_num_seqs):
            return False
        newcomer = sequence.num_cached < 0
        # A preempted sequence whose last token is not known yet is not whole. A free block is
        # left for each running sequence, so that the newcomer's entry is not paid with a
        # preemption at the next block border.
        if sequence.num_in_flight or not self._tables.place(sequence, len(self._running)):
            return False
        self._queues.leave(sequence)
        if self._swap is not None and self._swap.load(sequence, newcomer, ahead):
            return True
        self._queues.run(sequence)
        if draft.budget > 0 or draft.make_room():
            count = min(sequence.num_tokens - sequence.num_computed, max(1, draft.budget))
            draft.put(sequence, count)
            paid = max(sequence.num_cached, sequence.charged_prompt)
            fresh = min(sequence.num_computed, sequence.num_prompt) - paid
            if fresh > 0 and draft.budget > 0:
                self._queues.entered(sequence.account, fresh)
        return True

    def _enter_loaded(self, draft: Draft, may_preempt: bool) -> None:
        """Sequences whose KV is back join the batch, as far as it has places."""
        swap = self._swap
        if swap is None or not swap.loaded:
            return
        free = self._max_num_seqs - len(self._running)
        if free <= 0 and may_preempt and self._displace(draft, swap.loaded[0], 0, 1):
            free = self._max_num_seqs - len(self._running)
        for sequence in swap.take_loaded(free):
            self._queues.run(sequence)

    def _next(self) -> Sequence | None:
        """The waiting sequence that is to enter first."""
        if self._promised is not None:
            return self._promised
        for sequence in self._waiting:
            if not sequence.held and not self._is_busy(sequence):
                return sequence
        return None

    def _is_busy(self, sequence: Sequence) -> bool:
        return self._swap is not None and self._swap.busy(sequence)

    # ---- room

    def _lack(self, sequence: Sequence) -> tuple[int, int]:
        """Blocks and places that a waiting sequence lacks, copies under way counted as done."""
        seats = len(self._running) + self.num_loading + 1 - self._max_num_seqs
        blocks = self._tables.shortfall(sequence, len(self._running))
        if blocks > 0 and self._swap is not None:
            blocks -= self._swap.num_coming()
        return blocks, seats

    def _room_comes(self, sequence: Sequence) -> bool:
        """It lacks nothing but the end of copies."""
        blocks, seats = self._lack(sequence)
        return blocks <= 0 and seats <= 0

    def _can_enter(self, sequence: Sequence) -> bool:
        """There is room for it, or will be once those that it may displace have left."""
        if sequence.num_in_flight or sequence is self._hopeless:
            return False
        blocks, seats = self._lack(sequence)
        if blocks <= 0 and seats <= 0:
            return True
        return self._choose(sequence, blocks, seats) is not None

    def _make_way(self, draft: Draft, sequence: Sequence) -> bool:
        """Preempt for a waiting sequence; false if that cannot help it."""
        if sequence.num_in_flight:
            return False
        blocks, seats = self._lack(sequence)
        if blocks > 0 or seats > 0:
            return self._displace(draft, sequence, blocks, seats)
        # Decodes of a tenant far ahead may also take the tokens that it needs. One of a less
        # urgent class does not leave for that: prefills end, and theirs pause.
        return draft.budget <= 0 and self._displace(draft, sequence, 0, 1, for_tokens=True)

    def _displace(
        self,
        draft: Draft,
        sequence: Sequence,
        blocks: int,
        seats: int,
        for_tokens: bool = False,
    ) -> bool:
        if sequence is self._hopeless:
            return False
        victims = self._choose(sequence, blocks, seats, for_tokens)
        if victims is None:
            if not for_tokens:
                self._hopeless = sequence
            return False
        for victim, reason in victims:
            self._preempt(draft, victim, reason)
        return True

    def _choose(
        self, sequence: Sequence, blocks: int, seats: int, for_tokens: bool = False
    ) -> list[tuple[Sequence, PreemptionReason]] | None:
        shared = self._tables.hits(sequence) if blocks > 0 else ()
        references = self._tables.pool.num_references
        return self._priorities.choose_victims(
            sequence,
            self._running,
            blocks,
            seats,
            references,
            self._budget.beside,
            shared,
            for_tokens,
        )

    def _grow(self, draft: Draft, sequence: Sequence, count: int) -> bool:
        """Blocks for ``count`` more positions, preempting others if need be.

        The victim is the running sequence of lowest priority; false if that is the growing
        sequence itself, or if blocks enough come free once copies from them have ended.
        """
        wanted = sequence.num_computed + count
        while not self._tables.grow(sequence, wanted):
            missing = self._tables.blocks_for(wanted) - len(sequence.block_table)
            if self._swap is not None and self._swap.frees(missing):
                self.num_blocked += 1
                return False
            self._read_priorities(draft)
            victim = self._running[-1]
            self._preempt(draft, victim, PreemptionReason.OVERFLOW)
            if victim is sequence:
                return False
        return True

    def _preempt(self, draft: Draft, victim: Sequence, reason: PreemptionReason) -> None:
        draft.drop(victim)
        draft.plan.preempted.append(victim)
        self.figures.preemptions[reason] += 1
        self._queues.leave(victim)
        self._paused.discard(victim)
        victim.status = _WAITING
        if self._swap is None or not self._swap.leave(victim, self._sequences.values()):
            # Full blocks stay in the prefix cache, so what is not overwritten until the
            # victim returns is not computed again.
            self._tables.release(victim)
        victim.num_preemptions += 1
        self._queues.wait(victim)

    def _read_priorities(self, draft: Draft) -> None:
        """Every few steps, after each with prefill, and only where somebody could go before
        another."""
        if draft.plan.number >= self._read_due:
            self._read_due = draft.plan.number + self._interval
            self._hopeless = None
            self._queues.read_priorities(self._sequences.values())
