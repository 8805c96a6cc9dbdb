"""Who is served first, and who may take another's place.

A sequence's *rank* is (class, its tenant's counter, arrival, not preempted before, id); the
smaller is served first. Counters grow with every token, so ranks hold a reading of them that
is renewed every few steps: queues keep their order in between.

*Theta* is how far one tenant must be ahead of another before a preemption evens it out.
Taking turns costs a swap each time, so theta is at least twice the service that the
instance could have given in that time: preemption cannot thrash.
"""

from __future__ import annotations

import enum
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from operator import attrgetter

from instance.fairness import OUTPUT_WEIGHT, ServiceCounters, service
from instance.request import Account, Sequence, SequenceStatus

rank_of = attrgetter("rank")
"""Sort key of the queues."""

SwapCost = Callable[[int], float]
"""Service that an instance forgoes to take a sequence of so many computed tokens out of the
batch and in again."""


def recompute_cost(tokens: int) -> float:
    """``SwapCost`` of an instance that gives KV up: all of it is computed again."""
    return service(tokens, 0)


class PreemptionReason(enum.StrEnum):
    """Why a sequence lost its place in the batch.

    OVERFLOW: Others of the batch needed its memory to go on.
    PRIORITY: One of a more urgent class waited.
    FAIRNESS: One of a tenant further behind waited.
    """

    OVERFLOW = "overflow"
    PRIORITY = "priority"
    FAIRNESS = "fairness"


class Priorities:
    """Ranks of the sequences of one instance.

    Args:
        counters: Who keeps the tenants' service.
        theta: Fixed; None derives it from ``swap_cost``.
        swap_cost: Asked again at every reading.
        interval: Steps between two readings. A derived theta is at least what the batch is
            served in that time: no smaller difference is known for certain.
        max_rows: Of the batch; a derived theta is that of a full one until something runs.

    Attributes:
        theta: In units of the counters: service by weight.
    """

    def __init__(
        self,
        counters: ServiceCounters,
        theta: float | None = None,
        swap_cost: SwapCost = recompute_cost,
        interval: int = 0,
        max_rows: int = 0,
    ) -> None:
        self.counters = counters
        self.swap_cost = swap_cost
        self._fixed = theta
        self._interval = interval
        self._known: dict[Account, float] = {}
        self.theta = least_gap(max_rows, interval) if theta is None else theta

    def rank(self, sequence: Sequence) -> None:
        """Give a sequence that enters a queue its rank, by the last reading."""
        request, account = sequence.request, sequence.account
        counter = self._known.get(account)
        if counter is None:
            counter = self._known[account] = self.counters.counter(account)
        sequence.rank = (
            account[1],
            counter,
            request.arrival,
            not sequence.num_preemptions,
            request.request_id,
        )

    def plan(self, account: Account, prompt: int) -> None:
        """So many prompt tokens of an account were planned after the last reading."""
        self._known[account] += service(prompt, 0) / self.counters.weight(account[0])

    def read(self, sequences: Iterable[Sequence]) -> None:
        """Read the counters anew, as if all that is planned were done; the caller sorts its
        queues afterwards. A derived theta stays as it is while nothing runs.
        """
        live = list(sequences)
        counters = self.counters
        known = self._known = {}
        longest = rows = 0
        for sequence in live:
            account, computed = sequence.account, sequence.num_computed
            if account not in known:
                known[account] = counters.counter(account)
            if computed:
                longest = max(longest, computed)
                rows += sequence.status is SequenceStatus.RUNNING
                planned = _planned(sequence)
                if planned:
                    known[account] += planned / counters.weight(account[0])
        for sequence in live:
            rank = sequence.rank
            counter = known[sequence.account]
            sequence.rank = rank[0], counter, rank[2], not sequence.num_preemptions, rank[4]
        if self._fixed is None and rows:
            cost = max(least_gap(rows, self._interval), 2 * self.swap_cost(longest))
            self.theta = cost / min(counters.weight(tenant) for tenant, _ in known)

    def entitled(self, candidate: Sequence, victim: Sequence) -> PreemptionReason | None:
        """Why a waiting sequence may take a running one's place; None if it may not."""
        one, other = candidate.rank, victim.rank
        if one[0] != other[0]:
            return PreemptionReason.PRIORITY if other[0] > one[0] else None
        return PreemptionReason.FAIRNESS if other[1] - one[1] > self.theta else None

    def choose_victims(
        self,
        candidate: Sequence,
        running: SequenceOf[Sequence],
        blocks: int,
        seats: int,
        references: Callable[[int], int],
        prefill: Callable[[int], int] = lambda _: 0,
        useless: Iterable[int] = (),
        for_tokens: bool = False,
    ) -> list[tuple[Sequence, PreemptionReason]] | None:
        """Whom to preempt so that a waiting sequence can enter: no more than needed.

        Those furthest behind in rank go first. A tenant that is ahead, but whose decodes are
        given no more service in a step, by weight, than the candidate's tenant is, loses none
        of them: the gap between the two does not grow, and taking turns would cost swaps.

        Args:
            candidate: Waits.
            running: By rank.
            blocks: KV blocks that it lacks while all of ``running`` stay; each one that
                leaves needs one fewer to grow into.
            seats: Places in the batch that it lacks.
            references: How many holders a block has.
            prefill: Tokens that a step computes for prefills beside so many decodes.
            useless: Blocks that the candidate shares: it gains nothing where they are freed.
            for_tokens: What it lacks are tokens of the step: only decodes give such, and those
                of other classes are left alone.

        Returns:
            None where all it may preempt would not suffice.
        """
        chosen: list[tuple[Sequence, PreemptionReason]] = []
        room = _Room(blocks, seats, references, useless)
        rates: defaultdict[Account, float] | None = None
        own = candidate.account
        for victim in reversed(running):
            reason = self.entitled(candidate, victim)
            if reason is None:
                return None  # nor may it preempt any that ranks before
            if for_tokens and (reason is not PreemptionReason.FAIRNESS or prefills(victim)):
                continue
            if reason is PreemptionReason.FAIRNESS and not prefills(victim):
                if rates is None:
                    rates = _service_rates(running, own, prefill)
                theirs = victim.account
                weight = self.counters.weight
                if rates[theirs] * weight(own[0]) <= rates[own] * weight(theirs[0]):
                    continue
                rates[theirs] -= service(0, 1)
            chosen.append((victim, reason))
            room.give(victim)
            if room.suffices:
                return self._spare(chosen, room)
        return None

    @staticmethod
    def _spare(
        chosen: list[tuple[Sequence, PreemptionReason]], room: _Room
    ) -> list[tuple[Sequence, PreemptionReason]]:
        """Without those whose leaving the others make unnecessary; the last is necessary."""
        for entry in chosen[:-1]:
            room.take(entry[0])
            if room.suffices:
                chosen.remove(entry)
            else:
                room.give(entry[0])
        return chosen


def _planned(sequence: Sequence) -> float:
    """Service that the steps which run or are planned give a sequence, not charged yet."""
    if sequence.silent:
        return 0.0
    paid = max(sequence.charged_prompt, sequence.num_cached)
    prompt = min(sequence.num_computed, sequence.num_prompt) - paid
    return service(max(0, prompt), sequence.num_in_flight)


def prefills(sequence: Sequence) -> bool:
    """More than one of its positions is still to be computed."""
    return sequence.num_tokens - sequence.num_computed > 1


def _service_rates(
    running: SequenceOf[Sequence], own: Account, prefill: Callable[[int], int]
) -> defaultdict[Account, float]:
    """Service in a step of each account's decodes, and of the prefills of ``own``."""
    rates: defaultdict[Account, float] = defaultdict(float)
    behind = decodes = 0
    for sequence in running:
        if not prefills(sequence):
            rates[sequence.account] += service(0, 1)
            decodes += 1
        elif sequence.account == own:
            behind += sequence.num_tokens - sequence.num_computed
    rates[own] += service(min(behind, prefill(decodes)), 0)
    return rates


class _Room:
    """What a candidate still lacks while victims are being chosen."""

    def __init__(
        self, blocks: int, seats: int, references: Callable[[int], int], useless: Iterable[int]
    ) -> None:
        self._blocks = blocks
        self._seats = seats
        self._references = references
        self._useless = frozenset(useless)
        self._given: Counter[int] = Counter()

    @property
    def suffices(self) -> bool:
        return self._blocks <= 0 and self._seats <= 0

    def give(self, victim: Sequence) -> None:
        """The victim leaves: its place and the blocks that nobody else holds are free."""
        given, references = self._given, self._references
        for block in victim.block_table:
            given[block] += 1
            if given[block] == references(block) and block not in self._useless:
                self._blocks -= 1
        self._blocks -= 1
        self._seats -= 1

    def take(self, victim: Sequence) -> None:
        """The victim stays after all."""
        given, references = self._given, self._references
        for block in victim.block_table:
            if given[block] == references(block) and block not in self._useless:
                self._blocks += 1
            given[block] -= 1
        self._blocks += 1
        self._seats += 1


def least_gap(rows: int, interval: int) -> float:
    """Service that so many decodes are given between two readings of the counters."""
    return OUTPUT_WEIGHT * rows * interval
