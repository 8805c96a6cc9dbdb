"""Durations of steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instance.budget import attended
from instance.executor import StepBatch
from instance.request import Request, Row, SamplingParams, Sequence, StepPlan
from instance.step_cost import StepCost

costs = st.builds(
    StepCost,
    *(st.floats(0, 1) for _ in range(5)),
    st.floats(0, 200),
)
rows = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 60)), min_size=1, max_size=8)


def batch(shape: list[tuple[int, int]]) -> StepBatch:
    made = []
    for start, count in sorted(shape, key=lambda row: row[1] > 1):
        request = Request("r", tuple(range(start + count)), SamplingParams())
        sequence = Sequence.start(request)
        sequence.block_table = list(range(1, 100))
        made.append(Row(sequence, start, count, True))
    return StepBatch.build(StepPlan(0, made), 4)


@given(costs, rows)
def test_a_batch_costs_what_its_rows_say(cost: StepCost, shape: list[tuple[int, int]]) -> None:
    decodes = [start for start, count in shape if count == 1]
    prefills = [row for row in shape if row[1] > 1]
    tokens = sum(count for _, count in prefills)
    pairs = sum(attended(start, count) for start, count in prefills)
    context = sum(start + 1 for start in decodes)
    hidden = max(0.0, cost.hidden_tokens - len(decodes))
    expected = (
        cost.base
        + cost.prefill_token * max(0.0, tokens - hidden)
        + cost.prefill_context * pairs
        + cost.decode_sequence * len(decodes)
        + cost.context_token * context
    )
    assert cost.of(tokens, pairs, len(decodes), context) == pytest.approx(expected)
    assert cost.seconds(batch(shape)) == pytest.approx(expected)


@given(costs, rows, st.tuples(st.integers(0, 300), st.integers(1, 60)))
def test_more_work_never_takes_less(
    cost: StepCost, shape: list[tuple[int, int]], more: tuple[int, int]
) -> None:
    assert cost.seconds(batch([*shape, more])) >= cost.seconds(batch(shape)) - 1e-9


@pytest.mark.parametrize("value", [-1e-9, float("nan"), float("inf")])
def test_what_is_no_cost_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="context_token"):
        StepCost(context_token=value)


@given(costs, st.floats(0, 100), st.integers(1, 30), st.integers(0, 10_000), st.integers(0, 60))
def test_steps_in_a_row_end_where_one_after_the_other_does(
    cost: StepCost, began: float, rows: int, context: int, steps: int
) -> None:
    expected, at = [], began
    for step in range(steps):
        at += cost.of(0, 0, rows, context + step * rows)
        expected.append(at)
    assert cost.decodes_end(began, rows, context, steps) == expected
