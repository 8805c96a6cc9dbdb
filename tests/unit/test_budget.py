"""The learner of step costs, and the prefill that a step may hold."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instance.budget import (
    MIN_CHUNK,
    SLOWEST,
    STRETCH,
    STRETCH_FOR_LESS_URGENT,
    StepCostLearner,
    StepCosts,
    StepShape,
    TokenBudget,
    attended,
)
from instance.request import Request, RequestClass, Row, SamplingParams, Sequence, StepPlan

COSTS = StepCosts(0.01, 5e-4, 1e-7, 1e-3, 1e-6)
STANDARD = {RequestClass.STANDARD}
PROMPT = RequestClass.STANDARD


def shape(rng: random.Random) -> StepShape:
    decodes = rng.randrange(33)
    prefill = rng.choice((0, 0, 32, 128, 400)) if decodes else rng.choice((32, 128, 400))
    return StepShape(
        prefill,
        attended(rng.randrange(3000), prefill),
        decodes,
        sum(rng.randrange(10, 3000) for _ in range(decodes)),
    )


def taught(
    costs: StepCosts, seed: int = 0, noise: float = 0.0, targets: tuple[float, ...] = ()
) -> TokenBudget:
    """A budget of 512 tokens whose learner has seen 150 steps."""
    budget = TokenBudget(512, targets)
    rng = random.Random(seed)
    for _ in range(150):
        one = shape(rng)
        budget.learner.observe(one, costs.seconds(one) * rng.gauss(1.0, noise))
    return budget


LEARNER = taught(COSTS).learner


def step(prefill: int, decodes: int, context: int) -> StepPlan:
    sequence = Sequence.start(Request("a", (1,), SamplingParams()))
    rows = [Row(sequence, context - 1, 1, True)] * decodes
    return StepPlan(1, rows + [Row(sequence, 0, prefill, False)] * (prefill > 0))


# ---- shapes


@given(start=st.integers(0, 500), length=st.integers(0, 300))
def test_attended_counts_every_pair(start: int, length: int) -> None:
    assert attended(start, length) == sum(range(start + 1, start + length + 1))


def test_the_shape_of_a_plan() -> None:
    assert StepShape.of(step(7, 3, 20)) == StepShape(7, 28, 3, 60)
    assert StepShape.of(step(0, 2, 5)) == StepShape(0, 0, 2, 10)


@given(
    seconds=st.floats(1e-4, 10.0),
    start=st.integers(0, 100_000),
    per_token=st.floats(1e-6, 1e-2),
    per_pair=st.floats(0.0, 1e-5),
)
def test_what_prefill_fits_a_time_takes_that_time(
    seconds: float, start: int, per_token: float, per_pair: float
) -> None:
    costs = StepCosts(prefill=per_token, prefill_context=per_pair)
    length = costs.prefill_within(seconds, start)
    pairs = length * start + length * (length + 1) / 2
    assert per_token * length + per_pair * pairs == pytest.approx(seconds, rel=1e-6)


def test_prefill_that_costs_nothing_or_has_no_time() -> None:
    assert StepCosts().prefill_within(1.0, 5) == math.inf
    assert COSTS.prefill_within(0.0, 5) == COSTS.prefill_within(-1.0, 5) == 0.0


# ---- learning


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    base=st.floats(1e-3, 0.1),
    prefill=st.floats(1e-5, 1e-2),
    pair=st.sampled_from((0.0, 1e-8, 1e-6)),
    decode=st.floats(0.0, 1e-2),
    context=st.sampled_from((0.0, 1e-7, 1e-5)),
)
def test_any_costs_are_learned(
    seed: int, base: float, prefill: float, pair: float, decode: float, context: float
) -> None:
    costs = StepCosts(base, prefill, pair, decode, context)
    learned = taught(costs, seed=seed).learner.costs
    rng = random.Random(seed + 1)
    for _ in range(20):
        one = shape(rng)
        assert learned.seconds(one) == pytest.approx(costs.seconds(one), rel=0.1)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_noisy_machine_moves_the_fit_little(seed: int) -> None:
    rng = random.Random(seed)
    learner = taught(COSTS, seed=seed, noise=0.05).learner
    for _ in range(300):
        one = shape(rng)
        held_up = rng.choice((3.0, 10.0, 100.0)) if rng.random() < 0.05 else 1.0
        learner.observe(one, COSTS.seconds(one) * rng.gauss(1.0, 0.05) * held_up)
    for _ in range(20):
        one = shape(rng)
        assert learner.costs.seconds(one) == pytest.approx(COSTS.seconds(one), rel=0.35)
    assert min(vars_of(learner.costs)) >= 0.0


def vars_of(costs: StepCosts) -> tuple[float, ...]:
    return (costs.base, costs.prefill, costs.prefill_context, costs.decode, costs.decode_context)


def test_a_machine_that_became_slower_is_followed() -> None:
    learner = taught(COSTS).learner
    rng = random.Random(7)
    for _ in range(300):
        one = shape(rng)
        learner.observe(one, 3 * COSTS.seconds(one))
    one = StepShape(100, 5000, 16, 16000)
    assert learner.costs.seconds(one) == pytest.approx(3 * COSTS.seconds(one), rel=0.25)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_what_is_no_time_teaches_nothing(seconds: float) -> None:
    learner = StepCostLearner()
    learner.observe(StepShape(10, 55, 1, 10), seconds)
    learner.observe(StepShape(), 1.0)
    assert learner.samples == learner.prefill_samples == 0


# ---- the budget


def test_nothing_is_bounded_before_prefill_was_measured() -> None:
    budget = TokenBudget(512)
    for _ in range(20):
        budget.observe(step(0, 4, 100), 0.01)
    assert not budget.learned
    assert budget.allow(4, 400, STANDARD, 0, PROMPT) == 508


def test_without_decodes_the_whole_budget_is_there() -> None:
    assert taught(COSTS).allow(0, 0, set(), 1000, PROMPT) == 512


@settings(max_examples=60, deadline=None)
@given(
    decodes=st.integers(1, 64),
    context=st.integers(1, 4000),
    start=st.integers(0, 4000),
    target=st.sampled_from((0.0, 0.001, 0.05, 0.2, math.inf)),
)
def test_a_step_stays_inside_the_target(
    decodes: int, context: int, start: int, target: float
) -> None:
    budget = TokenBudget(512, (0.0, target))
    budget.learner = LEARNER
    allowed = budget.allow(decodes, decodes * context, STANDARD, start, PROMPT)
    most = 512 - decodes
    assert min(MIN_CHUNK, most) <= allowed <= most
    alone = COSTS.seconds(StepShape(0, 0, decodes, decodes * context))
    limit = target or STRETCH * alone
    whole = COSTS.seconds(StepShape(allowed, attended(start, allowed), decodes, decodes * context))
    assert allowed <= MIN_CHUNK or whole <= 1.1 * limit
    if allowed < most:
        more = allowed + MIN_CHUNK + allowed // 5
        longer = StepShape(more, attended(start, more), decodes, decodes * context)
        assert COSTS.seconds(longer) >= 0.9 * limit


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_where_steps_vary_their_slowest_percentile_is_bounded(seed: int, noise: float) -> None:
    """Times are the fit's and a noise with heavy tails; prompts come and go."""
    rng = random.Random(seed)
    budget = taught(COSTS, seed=seed)
    alone = COSTS.seconds(StepShape(0, 0, 8, 8000))
    assert budget.stretch == STRETCH
    slow = steps = 0
    for number in range(200):
        allowed = budget.allow(8, 8000, STANDARD, 0, PROMPT) if number % 5 else 0
        one = StepShape(allowed, attended(0, allowed), 8, 8000)
        off = rng.expovariate(1.0) * rng.choice((-noise, noise)) / 2
        seconds = COSTS.seconds(one) * max(0.1, 1.0 + off)
        budget.learner.observe(one, seconds)
        if number >= 50:
            steps += 1
            slow += seconds > 1.35 * SLOWEST * alone
    assert 2.0 <= budget.stretch <= STRETCH
    assert slow <= steps * 0.03


def test_a_calm_machine_gives_prefill_more_than_one_whose_steps_vary() -> None:
    calm, rough = taught(COSTS), taught(COSTS, noise=0.3)
    assert rough.stretch < calm.stretch == STRETCH
    given_rough, given_calm = (one.allow(8, 8000, STANDARD, 0, PROMPT) for one in (rough, calm))
    assert MIN_CHUNK < given_rough < given_calm


def test_the_tightest_class_of_the_batch_counts() -> None:
    budget = taught(COSTS, targets=(0.05, 0.15, math.inf))
    interactive, standard, batch = (
        budget.allow(4, 400, {one}, 0, PROMPT)
        for one in (RequestClass.INTERACTIVE, RequestClass.STANDARD, RequestClass.BATCH)
    )
    assert interactive < standard < batch == 508
    assert budget.allow(4, 400, set(RequestClass), 0, PROMPT) == interactive == budget.prefill
    assert budget.beside(4) == interactive
    assert budget.beside(512) == 0


@settings(max_examples=60, deadline=None)
@given(
    decodes=st.sets(st.sampled_from(RequestClass), min_size=1),
    prompt=st.sampled_from(RequestClass),
    rows=st.integers(1, 64),
    context=st.integers(1, 4000),
)
def test_prompts_of_a_less_urgent_class_stretch_steps_less(
    decodes: set[RequestClass], prompt: RequestClass, rows: int, context: int
) -> None:
    budget = TokenBudget(4096)
    budget.learner = LEARNER
    allowed = budget.allow(rows, rows * context, decodes, 0, prompt)
    alike = budget.allow(rows, rows * context, {prompt}, 0, prompt)
    if min(decodes) >= prompt:
        assert allowed == alike
        return
    alone = COSTS.seconds(StepShape(0, 0, rows, rows * context))
    whole = COSTS.seconds(StepShape(allowed, attended(0, allowed), rows, rows * context))
    assert MIN_CHUNK <= allowed <= alike
    assert allowed == MIN_CHUNK or whole <= 1.1 * STRETCH_FOR_LESS_URGENT * alone


def test_a_target_that_is_set_holds_whatever_the_class_of_the_prompt() -> None:
    budget = taught(COSTS, targets=(0.05, 0.15, math.inf))
    asked = {budget.allow(4, 400, {RequestClass.INTERACTIVE}, 0, one) for one in RequestClass}
    assert len(asked) == 1


def test_of_steps_that_only_decode_the_first_is_learned_from() -> None:
    budget = TokenBudget(512)
    budget.observe(step(20, 2, 10), 0.02)
    for _ in range(10):
        budget.observe(step(0, 2, 10), 0.01)
    assert (budget.learner.samples, budget.learner.prefill_samples) == (2, 1)
