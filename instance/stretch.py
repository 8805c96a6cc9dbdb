"""Steps in which nothing but decoding happens, accounted for together.

While every running sequence decodes, nobody enters, ends or loses KV, a step differs from
the one before only in that each sequence is one token longer. Whoever knows how long steps
take and what they draw (a simulator) can then do many of them at once. What comes out is
exactly what stepping gives: the same tokens, block tables, hashes and plans.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from instance.kv.blocks import IntegrityError
from instance.kv.tables import BlockTables
from instance.limits import Limits
from instance.request import Row, Sequence, StepPlan


def steady_steps(
    launched: StepPlan,
    planned: StepPlan,
    running: SequenceOf[Sequence],
    limits: Limits,
    tables: BlockTables,
    most: int,
    spare: int,
) -> int:
    """How many steps can end so that the plans made meanwhile are like ``planned``.

    Args:
        launched: The plan that runs.
        planned: The one after it.
        running: The batch, in the order in which it is planned.
        limits: Where sequences end.
        tables: Blocks must suffice for all these plans.
        most: No more than so many.
        spare: Blocks that must stay free.

    Returns:
        0 where the two plans are not such steps.
    """
    count = len(running)
    if most < 1 or not count or len(launched.rows) != count or len(planned.rows) != count:
        return 0
    for plan in (launched, planned):
        for _, _, length, samples in plan.rows:
            if length != 1 or not samples:
                return 0
    steps = most
    for sequence in running:
        if sequence.num_in_flight != 2:
            return 0
        # The plan ``steps`` after ``planned`` still has a row for it.
        steps = min(steps, limits.length(sequence) - len(sequence.tokens) - 2)
    size, free = tables.pool.block_size, tables.pool.num_free - spare

    def wanted(steps: int) -> int:
        return sum(
            max(0, -(-(sequence.num_computed + steps) // size) - len(sequence.block_table))
            for sequence in running
        )

    if steps < 1 or free < 0:
        return 0
    if wanted(steps) <= free:
        return steps
    low, high = 0, steps
    while high - low > 1:
        middle = (low + high) // 2
        if wanted(middle) <= free:
            low = middle
        else:
            high = middle
    return low


def advance(
    launched: StepPlan,
    planned: StepPlan,
    running: SequenceOf[Sequence],
    tables: BlockTables,
    steps: int,
    tokens: SequenceOf[SequenceOf[int]],
) -> None:
    """Let ``steps`` steps end, and as many be planned: both plans move on by that number.

    Args:
        launched: The plan that runs; what becomes of it runs then.
        planned: The one after it, likewise.
        running: The batch, in the order in which it is planned.
        tables: Of the batch.
        steps: At most ``steady_steps``.
        tokens: What each row of ``launched`` draws, in the order of its rows.
    """
    size = tables.pool.block_size
    # What moves blocks, in the order of steps: first full ones are sealed as a step ends,
    # then the plan after the next finds room.
    due: list[tuple[int, int, int, Sequence, int]] = []
    for order, ((sequence, start, _, _), drawn) in enumerate(
        zip(launched.rows, tokens, strict=True)
    ):
        sequence.tokens.extend(drawn)
        step = size - start % size
        while step <= steps:
            due.append((step, 0, order, sequence, start + step))
            step += size
    for order, sequence in enumerate(running):
        computed = sequence.num_computed
        step = len(sequence.block_table) * size - computed + 1
        while step <= steps:
            due.append((step, 1, order, sequence, computed + step))
            step += size
    # The first three tell any two apart.
    due.sort()
    for _, grows, _, sequence, reached in due:
        if not grows:
            sequence.num_written = reached
            tables.seal(sequence)
        elif not tables.grow(sequence, reached):
            raise IntegrityError(f"{sequence.request_id}: no block for {reached} tokens")
    for sequence, start, _, _ in launched.rows:
        sequence.num_written = start + steps
    for sequence in running:
        sequence.num_computed += steps
    # A plan made anew has its rows in the order of the batch.
    if steps == 1:
        launched.rows = planned.rows
    else:
        launched.rows = [Row(one, one.num_computed - 2, 1, True) for one in running]
    planned.rows = [Row(one, one.num_computed - 1, 1, True) for one in running]
    launched.number += steps
    planned.number += steps
