"""What a grammar changes for the scheduler: held sequences, draws that fail, forced ends."""

from __future__ import annotations

import dataclasses

from instance.config import SchedulerConfig
from instance.kv.blocks import BlockPool
from instance.request import (
    FinishReason,
    Grammar,
    GrammarKind,
    SamplingParams,
    Sequence,
    SequenceStatus,
    StepPlan,
)
from instance.scheduler import Emission, Scheduler
from tests.unit.kv_driver import make

EOS = 2
DIGIT = Grammar(GrammarKind.REGEX, "[0-9]")


def scheduler() -> Scheduler:
    return Scheduler(SchedulerConfig(), BlockPool(64, 4))


def constrained(name: str, arrival: float = 0, **settings: int | bool) -> Sequence:
    request = make(name, [1, 2, 3], arrival=arrival).request
    params = SamplingParams(max_tokens=8, grammar=DIGIT, **settings)  # type: ignore[arg-type]
    return Sequence.start(dataclasses.replace(request, params=params), eos_token_ids=(EOS,))


def launched(core: Scheduler) -> StepPlan:
    plan = core.schedule()
    core.patch(plan)
    core.check_integrity()
    return plan


def step(core: Scheduler, token: int = 9) -> list[Emission]:
    plan = launched(core)
    emissions = core.complete(plan, [token for row in plan.rows if row.samples])
    core.check_integrity()
    return emissions


def test_a_held_sequence_lets_others_pass() -> None:
    core = scheduler()
    first, second, third = constrained("a", 1), make("b", [4, 5], arrival=2), constrained("c", 3)
    first.held = third.held = True
    for sequence in (first, second, third):
        core.add(sequence)
    assert [row.sequence for row in launched(core).rows] == [second]
    assert core.waiting == [first, third]
    third.held = False
    assert third in {row.sequence for row in launched(core).rows}
    first.held = False
    assert first in {row.sequence for row in launched(core).rows}
    assert core.waiting == []


def test_nothing_is_computed_while_all_are_held() -> None:
    core = scheduler()
    sequence = constrained("a")
    sequence.held = True
    core.add(sequence)
    assert launched(core).rows == []
    assert sequence.block_table == []
    core.abort("a")
    core.check_integrity()
    assert core.sequences == {}


def test_a_held_sequence_with_kv_gets_no_row() -> None:
    core = scheduler()
    sequence = constrained("a")
    core.add(sequence)
    step(core)
    sequence.held = True
    assert launched(core).rows == []
    assert sequence.status is SequenceStatus.RUNNING
    sequence.held = False
    assert [row.sequence for row in launched(core).rows] == [sequence]


def test_a_draw_that_fails_ends_its_sequence_alone() -> None:
    core = scheduler()
    bad, good = constrained("a", 1), make("b", [4, 5], arrival=2)
    core.add(bad)
    core.add(good)
    step(core)
    plan = launched(core)
    failing = [row.sequence for row in plan.rows].index(bad)
    emissions = core.complete(plan, [0, 7] if failing == 0 else [7, 0], errors={failing: "why"})
    core.check_integrity()
    assert emissions[failing] == Emission(bad, 1, (), FinishReason.ERROR)
    assert emissions[1 - failing].tokens == (7,)
    assert (bad.finish_reason, bad.error, bad.output) == (FinishReason.ERROR, "why", [9])
    assert bad.status is SequenceStatus.FINISHED
    assert (good.output, good.error) == ([9, 7], "")


def test_a_forced_end_counts_before_min_tokens() -> None:
    core = scheduler()
    sequence = constrained("a", min_tokens=5)
    core.add(sequence)
    step(core)
    [emission] = step(core, EOS)
    assert (emission.tokens, emission.finish_reason) == ((EOS,), FinishReason.STOP)


def test_ignore_eos_does_not_outlive_the_grammar() -> None:
    core = scheduler()
    sequence = constrained("a", ignore_eos=True)
    core.add(sequence)
    step(core)
    [emission] = step(core, EOS)
    assert emission.finish_reason is FinishReason.STOP
