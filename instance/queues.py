"""The batch of an instance and the queue before it."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from instance.kv.blocks import IntegrityError
from instance.priority import Priorities, rank_of
from instance.request import Account, Sequence, SequenceStatus

_RUNNING = SequenceStatus.RUNNING
_WAITING = SequenceStatus.WAITING


class Queues:
    """Who runs and who waits, each by rank; tells the counters whose requests wait.

    Args:
        priorities: Give the ranks.

    Attributes:
        running: Sequences in the batch.
        waiting: Sequences that are to enter it.
    """

    def __init__(self, priorities: Priorities) -> None:
        self.priorities = priorities
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []

    def run(self, sequence: Sequence) -> None:
        """Into the batch."""
        sequence.status = _RUNNING
        self.priorities.counters.waiting_ends(sequence.account, sequence.request_id)
        self.priorities.rank(sequence)
        insort(self.running, sequence, key=rank_of)

    def wait(self, sequence: Sequence) -> None:
        """Into the queue."""
        sequence.status = _WAITING
        self.priorities.counters.waiting_begins(sequence.account, sequence.request_id)
        self.priorities.rank(sequence)
        insort(self.waiting, sequence, key=rank_of)

    def entered(self, account: Account, prompt: int) -> None:
        """One that entered computes so many prompt tokens: its account goes behind others
        that are further behind by now."""
        self.priorities.plan(account, prompt)
        for queue in (self.running, self.waiting):
            for sequence in queue:
                if sequence.account == account:
                    self.priorities.rank(sequence)
            queue.sort(key=rank_of)

    def leave(self, sequence: Sequence) -> None:
        """Out of the list that the sequence is in, if any. One that waited still does, until
        it runs or ends.

        Raises:
            IntegrityError: It is not where its status says.
        """
        if sequence.status is _RUNNING:
            queue = self.running
        elif sequence.status is _WAITING:
            queue = self.waiting
        else:
            return
        index = bisect_left(queue, sequence.rank, key=rank_of)
        if index == len(queue) or queue[index] is not sequence:
            raise IntegrityError(f"{sequence.request_id} is {sequence.status} but not queued")
        del queue[index]

    def read_priorities(self, sequences: Iterable[Sequence]) -> None:
        """Renew the ranks of all live sequences, and the order of both lists."""
        self.priorities.read(sequences)
        self.running.sort(key=rank_of)
        self.waiting.sort(key=rank_of)

    def check_order(self) -> None:
        """Raise IntegrityError where a list is out of order."""
        for name, queue in (("running", self.running), ("waiting", self.waiting)):
            if queue != sorted(queue, key=rank_of):
                raise IntegrityError(f"the {name} queue is not in order")
