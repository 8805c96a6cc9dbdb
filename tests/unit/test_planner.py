"""Who enters, who makes way and who stands still, rule by rule."""

from __future__ import annotations

import pytest

from instance.budget import MIN_CHUNK
from instance.config import SchedulerConfig
from instance.fairness import TenantCounters
from instance.kv.blocks import BlockPool
from instance.priority import PreemptionReason
from instance.request import Request, RequestClass, SamplingParams, Sequence, StepPlan
from instance.scheduler import Scheduler
from tests.unit.test_budget import COSTS, taught

STANDARD, BATCH = RequestClass.STANDARD, RequestClass.BATCH
INTERACTIVE = RequestClass.INTERACTIVE


def scheduler(num_blocks: int = 64, theta: float = 10.0, **config: int) -> Scheduler:
    settings = SchedulerConfig(
        theta=theta,
        priority_interval=1,
        enable_prefix_caching=False,
        **config,  # type: ignore[arg-type]
    )
    return Scheduler(settings, BlockPool(num_blocks, 4), counters=TenantCounters())


def make(
    name: str,
    prompt: int = 4,
    tenant: str = "a",
    request_class: RequestClass = STANDARD,
    arrival: float = 0.0,
    output: int = 20,
) -> Sequence:
    params = SamplingParams(max_tokens=output)
    tokens = (sum(name.encode()),) * prompt
    return Sequence.start(Request(name, tokens, params, "", tenant, request_class, arrival=arrival))


def step(core: Scheduler) -> StepPlan:
    plan = core.schedule()
    core.patch(plan)
    core.complete(plan, [9] * sum(row.samples for row in plan.rows))
    core.check_integrity()
    return plan


def names(sequences: list[Sequence]) -> list[str]:
    return [one.request_id for one in sequences]


def rows(plan: StepPlan) -> dict[str, int]:
    return {row.sequence.request_id: row.length for row in plan.rows}


def decoding(core: Scheduler, *sequences: Sequence) -> None:
    for sequence in sequences:
        core.add(sequence)
    while any(one.num_tokens - one.num_computed > 1 or not one.num_computed for one in sequences):
        step(core)


def put_ahead(core: Scheduler, tenant: str, service: int) -> None:
    core.counters.charge((tenant, STANDARD), service, 0)


# ---- places in the batch


def test_a_more_urgent_class_takes_a_place_at_once() -> None:
    core = scheduler(max_num_seqs=2)
    decoding(core, make("low", request_class=BATCH), make("mid", arrival=1))
    core.add(make("high", request_class=INTERACTIVE, arrival=2))
    plan = step(core)
    assert names(plan.preempted) == ["low"]
    assert set(rows(plan)) == {"mid", "high"}
    assert core.figures.preemptions == {PreemptionReason.PRIORITY: 1}
    # The victim comes back when there is a place, not before.
    assert not step(core).preempted
    core.abort("mid")
    assert "low" in rows(step(core))


@pytest.mark.parametrize(("ahead", "displaced"), [(10, []), (30, ["b"])])
def test_a_tenant_behind_takes_a_place_beyond_theta(ahead: int, displaced: list[str]) -> None:
    core = scheduler(max_num_seqs=1)
    decoding(core, make("b", tenant="b"))
    core.add(make("a", tenant="a", arrival=1))
    level = core.counters.counter(("a", STANDARD))
    put_ahead(core, "b", int(level) + ahead - int(core.counters.counter(("b", STANDARD))))
    plan = step(core)
    assert names(plan.preempted) == displaced
    assert core.figures.preemptions[PreemptionReason.FAIRNESS] == len(displaced)


def test_nobody_is_displaced_while_there_is_room() -> None:
    core = scheduler(max_num_seqs=4)
    decoding(core, make("b", tenant="b", request_class=BATCH))
    core.add(make("a", request_class=INTERACTIVE))
    assert not step(core).preempted


def test_the_plan_of_a_running_step_displaces_and_its_patch_does_not() -> None:
    core = scheduler(max_num_seqs=1)
    decoding(core, make("low", request_class=BATCH))
    plan = core.schedule()
    core.add(make("high", request_class=INTERACTIVE))
    core.patch(plan)
    assert rows(plan) == {"low": 1}
    following = core.schedule()
    assert names(following.preempted) == ["low"]
    core.complete(plan, [9])
    core.patch(following)
    assert set(rows(following)) == {"high"}
    assert core.sequences["low"].num_output == 2


# ---- memory


def filled(*sizes: int) -> Scheduler:
    """Batch sequences that decode, with prompts of so many blocks, and 3 free blocks."""
    core = scheduler(max_num_seqs=8)
    for number, size in enumerate(sizes):
        decoding(core, make(f"low{number}", 4 * size, "b", BATCH, arrival=number))
    assert core.pool.reserve(core.pool.num_free - 3)
    return core


def test_a_long_one_displaces_several_if_together_they_suffice() -> None:
    core = filled(5, 5, 5)
    core.add(make("long", 4 * 8, request_class=INTERACTIVE))
    plan = step(core)
    assert names(plan.preempted) == ["low2", "low1"]
    assert set(rows(plan)) == {"low0", "long"}


def test_those_it_does_not_need_are_spared() -> None:
    core = filled(8, 1)
    core.add(make("long", 4 * 6, request_class=INTERACTIVE))
    plan = step(core)
    assert names(plan.preempted) == ["low0"]
    assert set(rows(plan)) == {"low1", "long"}


def test_nobody_makes_way_in_vain() -> None:
    core = filled(4, 4)
    core.add(make("long", 4 * 20, request_class=INTERACTIVE))
    for _ in range(4):
        assert set(rows(step(core))) == {"low0", "low1"}
    assert not core.figures.preemptions


def test_overflow_takes_the_class_then_the_tenant_furthest_ahead() -> None:
    core = scheduler(num_blocks=64, max_num_seqs=8, theta=1000.0)
    decoding(
        core,
        make("old", 4, "a"),
        make("ahead", 4, "b", arrival=1),
        make("new", 4, "a", arrival=2),
    )
    put_ahead(core, "b", 100)
    assert core.pool.reserve(core.pool.num_free)
    preempted: list[Sequence] = []
    while not preempted:
        preempted = step(core).preempted
    assert names(preempted)[0] == "ahead"
    assert core.figures.preemptions[PreemptionReason.OVERFLOW] == len(preempted)


# ---- prefill


def test_a_prefill_of_a_tenant_ahead_stands_still_for_one_that_can_enter() -> None:
    core = scheduler(num_blocks=200, max_num_seqs=4, max_num_batched_tokens=8)
    long = make("long", 100, "b")
    core.add(long)
    step(core)
    core.add(make("x", 24, "a", arrival=1))
    core.add(make("y", 24, "a", arrival=2))
    put_ahead(core, "b", 200)
    assert rows(step(core)) == {"x": 8}
    assert core.is_paused(long)
    assert (core.figures.pauses, core.figures.paused) == (1, 1)
    assert core.counters.waiting(STANDARD).keys() == {"a", "b"}
    # Both of a are in the batch in the end; then nobody waits for whom b would stand still.
    while core.waiting:
        assert "long" not in rows(step(core))
    while core.is_paused(long):
        step(core)
    assert core.counters.waiting(STANDARD).keys() == set()
    assert core.figures.paused == 0
    while "long" not in rows(step(core)):
        pass


def test_a_prefill_goes_on_if_the_one_behind_could_not_enter_anyway() -> None:
    core = scheduler(num_blocks=40, max_num_seqs=4, max_num_batched_tokens=8)
    own = make("own", 60, "a")
    decoding(core, own)
    core.add(make("b", 40, "b", arrival=1))
    step(core)
    core.add(make("a", 100, "a", arrival=2))
    put_ahead(core, "b", 300)
    plan = step(core)
    assert rows(plan).keys() == {"own", "b"}
    assert not plan.preempted
    assert core.figures.pauses == 0


def test_a_less_urgent_prefill_stands_still_but_decodes_go_on() -> None:
    core = scheduler(num_blocks=200, max_num_seqs=4, max_num_batched_tokens=8)
    decoding(core, make("d", 4, "a", BATCH))
    core.add(make("low", 50, "a", BATCH, arrival=1))
    step(core)
    core.add(make("high", 20, "a", INTERACTIVE, arrival=2))
    assert rows(step(core)) == {"d": 1, "high": 7}
    assert not core.figures.preemptions


# ---- the budget


def test_prefill_beside_decodes_is_bounded_once_costs_are_known() -> None:
    core = scheduler(num_blocks=600, max_num_seqs=8, max_num_batched_tokens=512)
    core.budget.learner = taught(COSTS).learner
    core.add(make("first", 400, output=3))
    assert rows(step(core)) == {"first": 400}  # nobody decodes
    core.add(make("second", 400, arrival=1))
    allowed = rows(step(core))["second"]
    assert MIN_CHUNK < allowed < 70  # in 2.5 times the 11.4 ms of the decode, at 0.5 ms each
    # A third gets no more room in the same step, but it all when the decode has ended.
    core.add(make("third", 400, arrival=2))
    assert "third" not in rows(step(core))
    while "first" in core.sequences:
        step(core)
    assert sum(rows(step(core)).values()) == 512
