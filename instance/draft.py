"""A step's plan while it is being made."""

from __future__ import annotations

from instance.request import Row, Sequence, StepPlan


class Draft:
    """At most one row per sequence, and the token budget left.

    Rows move the counters of their sequences as if the step were done.

    Args:
        plan: Filled by ``finish``; may have rows already.
        budget: Tokens that the step computes at most.

    Attributes:
        bounded: The budget left is what prefill may have beside the decodes.
    """

    def __init__(self, plan: StepPlan, budget: int) -> None:
        self.plan = plan
        self.rows = {row.sequence: row for row in plan.rows}
        self.budget = budget - (plan.num_tokens if plan.rows else 0)
        self.bounded = False

    @property
    def prefills(self) -> bool:
        """Some row computes more than one position."""
        return any(row.length > 1 for row in self.rows.values())

    def put(self, sequence: Sequence, count: int) -> None:
        """A row for the next ``count`` positions of a sequence that has none."""
        start = sequence.num_computed
        end = start + count
        samples = end == len(sequence.tokens) + sequence.num_in_flight
        self.rows[sequence] = Row(sequence, start, count, samples)
        self.budget -= count
        sequence.num_computed = end
        if samples:
            sequence.num_in_flight += 1

    def drop(self, sequence: Sequence) -> None:
        """Undo ``put``, if there was one."""
        row = self.rows.pop(sequence, None)
        if row is not None:
            self.budget += row.length
            sequence.num_computed = row.start
            if row.samples:
                sequence.num_in_flight -= 1

    def make_room(self) -> bool:
        """Have budget for a decode: if need be, the last prefill row is cut by one token."""
        if self.budget > 0:
            return True
        for row in reversed(self.rows.values()):
            if row.length > 1 or not row.samples:
                self.drop(row.sequence)
                if row.length > 1:
                    self.put(row.sequence, row.length - 1)
                return True
        return False

    def finish(self) -> None:
        """Write the rows back: decodes first, each kind in the order of entry."""
        decodes: list[Row] = []
        others: list[Row] = []
        for row in self.rows.values():
            _, _, length, samples = row
            (decodes if length == 1 and samples else others).append(row)
        self.plan.rows = decodes + others
