"""The scheduler, rule by rule."""

from __future__ import annotations

import pytest

from instance.config import SchedulerConfig
from instance.kv.blocks import BlockPool, IntegrityError, runs
from instance.request import FinishReason, RequestClass, Sequence, SequenceStatus, StepPlan
from instance.scheduler import Scheduler
from tests.unit.kv_driver import Driver, make


def scheduler(num_blocks: int = 64, block_size: int = 4, **config: int | bool) -> Scheduler:
    return Scheduler(SchedulerConfig(**config), BlockPool(num_blocks, block_size))  # type: ignore[arg-type]


def rows(plan: StepPlan) -> list[tuple[str, int, int, bool]]:
    return [(row.sequence.request_id, row.start, row.length, row.samples) for row in plan.rows]


def step(core: Scheduler, tokens: list[int] | None = None) -> StepPlan:
    """One whole step without overlap; draws 9s."""
    plan = core.schedule()
    core.patch(plan)
    core.complete(plan, tokens or [9 for row in plan.rows if row.samples])
    core.check_integrity()
    return plan


def running(core: Scheduler, sequence: Sequence) -> Sequence:
    """Add a sequence and prefill it alone with the batch."""
    core.add(sequence)
    while sequence.status is not SequenceStatus.RUNNING or sequence.num_computed < len(
        sequence.request.prompt
    ):
        step(core)
    return sequence


# ---- order and budget


def test_a_long_prompt_is_prefilled_in_chunks() -> None:
    driver = Driver(max_num_batched_tokens=8, max_num_seqs=4)
    driver.add(make("a", list(range(20)), max_tokens=3))
    driver.run()
    assert driver.steps == [
        [("a", 0, 8, False)],
        [("a", 8, 8, False)],
        [("a", 16, 4, True)],
        [("a", 20, 1, True)],
        [("a", 21, 1, True)],
    ]


def test_decodes_go_first_and_prefills_share_the_rest() -> None:
    core = scheduler(max_num_batched_tokens=8)
    running(core, make("a", [1, 2, 3], arrival=5))
    core.add(make("b", list(range(10)), arrival=1))
    core.add(make("c", list(range(30, 40)), arrival=2))
    assert rows(step(core)) == [("a", 3, 1, True), ("b", 0, 7, False)]
    # b's last chunk, then what is left of the budget for c.
    assert rows(step(core)) == [("a", 4, 1, True), ("b", 7, 3, True), ("c", 0, 4, False)]
    assert rows(step(core)) == [("b", 10, 1, True), ("a", 5, 1, True), ("c", 4, 6, True)]


def test_waiting_requests_enter_by_class_arrival_and_id() -> None:
    core = scheduler(max_num_seqs=1, max_num_batched_tokens=64)
    order = [
        make("late-batch", [1], request_class=RequestClass.BATCH, arrival=9),
        make("batch", [2], request_class=RequestClass.BATCH, arrival=1),
        make("b", [3], arrival=4),
        make("a", [4], arrival=4),
        make("interactive", [5], request_class=RequestClass.INTERACTIVE, arrival=8),
    ]
    for sequence in order:
        core.add(sequence)
    names = [sequence.request_id for sequence in core.waiting]
    assert names == ["interactive", "a", "b", "batch", "late-batch"]
    assert core.waiting_blocks() == 5
    entered = []
    while core.has_work():
        entered += [name for name, start, _, _ in rows(step(core)) if start == 0]
    assert entered == names


def test_a_small_request_does_not_pass_the_head_of_the_queue() -> None:
    core = scheduler(num_blocks=9, max_model_len=64)
    running(core, make("a", list(range(10)), max_tokens=10))
    core.add(make("big", list(range(40, 60)), max_tokens=4, arrival=1))
    core.add(make("small", [1], max_tokens=4, arrival=2))
    for _ in range(6):
        assert [name for name, *_ in rows(step(core))] == ["a"]
    while "a" in core.sequences:
        step(core)
    assert {name for name, *_ in rows(step(core))} == {"big", "small"}


def test_admission_leaves_a_block_for_each_running_sequence() -> None:
    core = scheduler(num_blocks=8)
    running(core, make("a", [1] * 8, max_tokens=8))  # holds 2 of 7 blocks, a third soon
    core.add(make("b", list(range(17)), max_tokens=2, arrival=1))  # wants all other 5
    assert [name for name, *_ in rows(step(core))] == ["a"]
    core.abort("b")
    core.add(make("c", list(range(9)), max_tokens=2, arrival=1))
    assert [name for name, *_ in rows(step(core))] == ["a", "c"]


def test_a_prompt_gets_one_run_of_blocks() -> None:
    core = scheduler(num_blocks=64, max_num_batched_tokens=8)
    sequence = make("a", list(range(50)))
    core.add(sequence)
    step(core)
    assert len(runs(sequence.block_table)) == 1
    assert len(sequence.block_table) == 13


def test_the_batch_never_outgrows_its_limits() -> None:
    core = scheduler(max_num_seqs=3, max_num_batched_tokens=64)
    for number in range(5):
        core.add(make(str(number), [number]))
    assert len(step(core).rows) == 3
    # A budget below max_num_seqs bounds the batch, so that no decode is ever skipped.
    core = scheduler(max_num_seqs=8, max_num_batched_tokens=2)
    for number in range(5):
        core.add(make(str(number), [number]))
    for _ in range(4):
        assert [name for name, *_ in rows(step(core))] == ["0", "1"]


@pytest.mark.parametrize("config", [{"max_num_seqs": 0}, {"max_num_batched_tokens": 0}])
def test_limits_of_nothing_are_refused(config: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        scheduler(**config)


# ---- overlap: plan, complete, patch


def test_a_plan_runs_ahead_of_the_tokens() -> None:
    core = scheduler()
    sequence = make("a", [1, 2, 3])
    core.add(sequence)
    first = core.schedule()
    core.patch(first)
    second = core.schedule()
    assert rows(second) == [("a", 3, 1, True)]
    assert (sequence.num_computed, sequence.num_in_flight, sequence.num_written) == (4, 2, 0)
    (emission,) = core.complete(first, [7])
    assert (emission.index, emission.tokens) == (0, (7,))
    assert emission.finish_reason is FinishReason.NOT_FINISHED
    assert (sequence.num_in_flight, sequence.num_written) == (1, 3)
    core.patch(second)
    assert rows(second) == [("a", 3, 1, True)]
    assert sequence.tokens == [1, 2, 3, 7]


def test_an_arrival_during_a_step_makes_the_next_one() -> None:
    core = scheduler()
    core.add(make("a", [1, 2, 3]))
    first = core.schedule()
    core.patch(first)
    second = core.schedule()
    core.add(make("b", [4, 5], request_class=RequestClass.INTERACTIVE))
    core.complete(first, [9])
    core.patch(second)
    assert rows(second) == [("a", 3, 1, True), ("b", 0, 2, True)]


def test_a_single_token_prompt_counts_as_a_decode_row() -> None:
    core = scheduler()
    core.add(make("long", [1, 2, 3]))
    core.add(make("short", [1], arrival=1))
    assert rows(core.schedule()) == [("short", 0, 1, True), ("long", 0, 3, True)]


def test_what_finished_leaves_the_plan_made_ahead() -> None:
    core = scheduler()
    sequence = make("a", [1, 2], stop=(5,))
    core.add(sequence)
    first = core.schedule()
    core.patch(first)
    second = core.schedule()
    (emission,) = core.complete(first, [5])
    assert emission.finish_reason is FinishReason.STOP
    assert sequence.status is SequenceStatus.FINISHED
    core.patch(second)
    assert not second.rows
    assert not core.has_work()
    core.check_integrity()
    assert core.pool.num_free == core.pool.num_usable


def test_nothing_is_planned_beyond_the_last_token() -> None:
    core = scheduler()
    core.add(make("a", [1, 2], max_tokens=2))
    first = core.schedule()
    core.patch(first)
    second = core.schedule()
    core.complete(first, [9])
    core.patch(second)
    assert not core.schedule().rows


def test_an_abort_counts_even_while_its_row_runs() -> None:
    core = scheduler()
    sequence = make("a", [1, 2])
    core.add(sequence)
    plan = core.schedule()
    core.patch(plan)
    following = core.schedule()
    assert core.abort("a") is sequence
    assert core.abort("a") is None
    assert (sequence.status, sequence.finish_reason) == (
        SequenceStatus.FINISHED,
        FinishReason.ABORT,
    )
    again = make("a", [3, 4])
    core.add(again)
    assert core.complete(plan, [9]) == []
    core.patch(following)
    assert rows(following) == [("a", 0, 2, True)]
    assert following.rows[0].sequence is again
    assert sequence.tokens == [1, 2]
    core.check_integrity()


def test_complete_wants_one_token_per_draw() -> None:
    core = scheduler()
    core.add(make("a", [1, 2]))
    plan = core.schedule()
    with pytest.raises(ValueError, match="2 tokens for 1 rows"):
        core.complete(plan, [1, 2])


# ---- ends


def test_min_tokens_come_before_a_stop_token_counts() -> None:
    core = scheduler()
    sequence = make("a", [1], min_tokens=2, stop=(5,))
    core.add(sequence)
    for _ in range(3):
        assert sequence.status is not SequenceStatus.FINISHED
        step(core, [5])
    assert (sequence.output, sequence.finish_reason) == ([5, 5, 5], FinishReason.STOP)


@pytest.mark.parametrize(
    ("max_tokens", "max_model_len", "length"), [(3, 64, 3), (50, 8, 5), (50, 4, 1)]
)
def test_a_sequence_ends_at_its_limits(max_tokens: int, max_model_len: int, length: int) -> None:
    core = scheduler(max_model_len=max_model_len)
    sequence = make("a", [1, 2, 3], max_tokens=max_tokens)
    core.add(sequence)
    while core.has_work():
        step(core)
    assert len(sequence.output) == length
    assert sequence.finish_reason is FinishReason.LENGTH


def test_what_can_never_fit_is_refused() -> None:
    core = scheduler(num_blocks=5, max_model_len=64)  # room for 16 tokens
    core.add(make("fits", [1] * 10, max_tokens=7))  # the last token needs no KV
    with pytest.raises(ValueError, match=r"up to 18 tokens .* need 5 KV blocks, the pool has 4"):
        core.add(make("large", [1] * 10, max_tokens=8))
    with pytest.raises(ValueError, match="already here"):
        core.add(make("fits", [1]))
    with pytest.raises(ValueError, match="empty prompt"):
        core.add(make("empty", []))
    with pytest.raises(ValueError, match="no token is left to draw"):
        core.add(make("long", [1] * 64))
    replayed = make("replayed", [1, 2], max_tokens=2)
    replayed.tokens += [3, 4]
    with pytest.raises(ValueError, match="no token is left to draw"):
        core.add(replayed)
    assert list(core.sequences) == ["fits"]


# ---- preemption


def test_the_last_by_class_and_arrival_is_the_victim() -> None:
    core = scheduler(num_blocks=30, enable_prefix_caching=False)
    kept = running(core, make("kept", [1] * 4, arrival=3, max_tokens=9))
    away = running(
        core, make("away", [2] * 4, request_class=RequestClass.BATCH, arrival=9, max_tokens=9)
    )
    core.take_out(away)
    victim = running(
        core, make("victim", [3] * 4, request_class=RequestClass.BATCH, arrival=1, max_tokens=9)
    )
    other = running(core, make("other", [4] * 4, arrival=5, max_tokens=9))
    fill(core)
    preempted: list[Sequence] = []
    while not preempted:
        preempted = step(core).preempted
    assert preempted == [victim]
    assert away.status is SequenceStatus.HANDOVER
    assert away.block_table
    assert kept in core.running
    assert other in core.running
    assert (victim.status, victim.num_computed, victim.block_table) == ("waiting", 0, [])
    assert victim.num_preemptions == 1
    assert victim.num_output > 0


def fill(core: Scheduler) -> list[int]:
    """Reserve all that is free, so that the next sequence to grow must preempt."""
    blocks = core.pool.reserve(core.pool.num_free)
    assert blocks is not None
    return blocks


def test_a_sequence_last_itself_makes_way() -> None:
    core = scheduler(enable_prefix_caching=False)
    first = running(core, make("first", [1, 1], max_tokens=9))
    last = running(core, make("last", [2] * 4, arrival=1, max_tokens=5))
    fill(core)
    plan = step(core)
    assert plan.preempted == [last]
    assert rows(plan) == [("first", 3, 1, True)]
    assert (first.num_preemptions, last.num_preemptions) == (0, 1)


def test_a_step_that_preempted_admits_nobody() -> None:
    core = scheduler(enable_prefix_caching=False)
    running(core, make("a", [1] * 3, max_tokens=12))
    victim = running(core, make("b", [2] * 9, arrival=1, max_tokens=8))
    blocks = fill(core)
    small = make("small", [4], request_class=RequestClass.INTERACTIVE, max_tokens=2)
    core.add(small)
    plan = step(core)
    assert plan.preempted == [victim]
    assert rows(plan) == [("a", 4, 1, True)]
    # There was room for it, and in the next step it enters.
    assert rows(step(core)) == [("a", 5, 1, True), ("small", 0, 1, True)]
    core.pool.release(blocks)
    while core.has_work():
        step(core)
    assert (len(victim.output), victim.num_preemptions) == (8, 1)


def test_a_decode_may_preempt_a_prefill_in_progress() -> None:
    core = scheduler(max_num_batched_tokens=4, enable_prefix_caching=False)
    running(core, make("a", [1] * 4, max_tokens=9))
    prefill = make("b", [2] * 20, arrival=1)
    core.add(prefill)
    assert rows(step(core)) == [("a", 4, 1, True), ("b", 0, 3, False)]
    while core.sequences["a"].num_computed < 8:
        step(core)
    fill(core)
    plan = step(core)
    assert plan.preempted == [prefill]
    assert rows(plan) == [("a", 8, 1, True)]


def test_a_prefill_that_grows_may_preempt_a_later_one() -> None:
    """Two sequences moved here in the middle of their prefill."""
    core = scheduler(enable_prefix_caching=False)
    for name, tokens in (("a", 5), ("b", 13)):
        sequence = arrived(core, name, tokens)
        sequence.tokens += [7] * 6
        core.insert(sequence)
    second = core.sequences["b"]
    fill(core)
    plan = step(core)
    assert plan.preempted == [second]
    assert rows(plan) == [("a", 4, 7, True)]
    assert (second.status, second.block_table) == ("waiting", [])


def test_a_sequence_preempted_for_a_late_arrival_leaves_the_plan() -> None:
    core = scheduler(enable_prefix_caching=False)
    victim = running(core, make("late", [1] * 6, arrival=1))
    sequence = arrived(core, "a", 9)
    fill(core)
    plan = core.schedule()
    before = victim.num_computed
    assert rows(plan) == [("late", before - 1, 1, True)]
    core.insert(sequence)
    core.patch(plan)
    assert plan.preempted == [victim]
    assert rows(plan) == [("a", 8, 1, True)]
    assert victim.num_in_flight == 0
    core.complete(plan, [9])
    core.check_integrity()
    assert victim.num_output == 1


def preempt_while_its_step_runs() -> tuple[Scheduler, Sequence, StepPlan, StepPlan]:
    """A victim whose row is in the launched step when the next plan preempts it."""
    core = scheduler()
    running(core, make("a", [1, 1], max_tokens=9))
    victim = running(core, make("b", [2] * 6, arrival=1, max_tokens=9, stop=(5,)))
    fill(core)
    launched = core.schedule()
    core.patch(launched)
    following = core.schedule()
    assert rows(launched) == [("a", 3, 1, True), ("b", 6, 1, True)]
    assert following.preempted == [victim]
    return core, victim, launched, following


def test_the_token_of_a_step_that_outlived_its_kv_is_kept() -> None:
    core, victim, launched, following = preempt_while_its_step_runs()
    assert victim.status is SequenceStatus.WAITING
    assert victim.num_in_flight == 1
    assert [name for name, *_ in rows(following)] == ["a"]
    known = len(victim.tokens)
    # Nobody else runs, yet it cannot return before its token is known.
    core.abort("a")
    assert rows(core.schedule()) == []
    emissions = core.complete(launched, [8] * len(launched.rows))
    assert [emission.sequence for emission in emissions] == [victim]
    assert len(victim.tokens) == known + 1
    assert (victim.num_written, victim.num_in_flight, victim.sealed) == (0, 0, 0)
    core.check_integrity()
    plan = core.schedule()
    (row,) = plan.rows
    assert row.start == victim.num_written > 0, "its own sealed block is hit"
    assert row.start + row.length == known + 1


def test_a_preempted_sequence_may_end_with_its_last_token() -> None:
    core, victim, launched, _ = preempt_while_its_step_runs()
    core.complete(launched, [9 if row.sequence is not victim else 5 for row in launched.rows])
    assert (victim.status, victim.finish_reason) == (SequenceStatus.FINISHED, FinishReason.STOP)
    assert core.waiting == []
    core.check_integrity()


def test_an_emptied_plan_admits_what_fits_by_then() -> None:
    """The only sequence had to make way for a copy that is gone when the plan starts."""
    core = scheduler(num_blocks=4)
    sequence = running(core, make("a", [1] * 3, max_tokens=9))
    blocks = core.pool.reserve(2)
    assert blocks is not None
    launched = core.schedule()
    core.patch(launched)
    following = core.schedule()
    assert following.preempted == [sequence]
    assert not following.rows
    core.pool.release(blocks)
    core.complete(launched, [9])
    core.patch(following)
    assert rows(following) == [("a", 0, 5, True)]


# ---- prefix cache


def test_a_hit_leaves_at_least_one_token_to_compute() -> None:
    core = scheduler()
    first = running(core, make("first", list(range(8))))
    assert first.num_cached == 0
    same = make("same", list(range(8)))
    longer = make("longer", list(range(9)))
    core.add(same)
    core.add(longer)
    plan = core.schedule()
    assert rows(plan)[1:] == [("longer", 8, 1, True), ("same", 4, 4, True)]
    assert (same.num_cached, longer.num_cached) == (4, 8)
    assert same.block_table[0] == longer.block_table[0] == first.block_table[0]
    assert core.pool.num_references(first.block_table[0]) == 3
    core.check_integrity()


def test_output_is_reused_by_the_next_turn() -> None:
    driver = Driver(max_model_len=64)
    driver.add(make("first", [1, 2, 3], max_tokens=10))
    driver.run()
    turn = [1, 2, 3, *driver.emitted["first"], 4]
    following = make("second", turn, max_tokens=3)
    driver.add(following)
    driver.run()
    assert following.num_cached == 12
    assert driver.emitted["second"] == driver.expected(following.request)[0]


def test_num_cached_is_that_of_the_first_admission() -> None:
    core = scheduler()
    sequence = running(core, make("a", list(range(9)), max_tokens=4))
    core.take_out(sequence)
    core.finish(sequence, FinishReason.NOT_FINISHED)
    again = make("a", list(range(9)), max_tokens=4)
    again.num_cached = 0  # it moved here while it waited
    core.add(again)
    core.schedule()
    assert (again.num_computed, again.num_cached) == (9, 0)
    assert again.num_written == 8


@pytest.mark.parametrize(("adapter", "cached"), [("one", 8), ("", 0), ("other", 0)])
def test_adapters_share_no_prefix(adapter: str, cached: int) -> None:
    core = scheduler()
    running(core, make("a", list(range(9)), adapter="one"))
    other = make("b", list(range(9)), adapter=adapter)
    core.add(other)
    core.schedule()
    assert other.num_cached == cached


def test_without_prefix_caching_nothing_is_shared_or_kept() -> None:
    core = scheduler(enable_prefix_caching=False)
    first = running(core, make("a", list(range(9)), max_tokens=4))
    second = running(core, make("b", list(range(9)), max_tokens=4))
    assert second.num_cached == 0
    assert not set(first.block_table) & set(second.block_table)
    while core.has_work():
        step(core)
    assert core.pool.num_cached == 0


# ---- migration's view


def test_a_sequence_leaves_the_batch_with_its_blocks_and_returns() -> None:
    core = scheduler()
    sequence = running(core, make("a", list(range(6))))
    waiting = make("b", [1], arrival=1)
    core.add(waiting)
    table = list(sequence.block_table)
    for one in (sequence, waiting):
        core.take_out(one)
        assert one.status is SequenceStatus.HANDOVER
    assert not core.has_work()
    assert not step(core).rows
    assert sequence.block_table == table
    core.put_back(sequence)
    core.put_back(waiting)
    assert (sequence.status, waiting.status) == ("running", "waiting")
    assert rows(step(core)) == [("a", 6, 1, True), ("b", 0, 1, True)]
    with pytest.raises(IntegrityError, match="not in handover"):
        core.put_back(sequence)


def test_a_sequence_in_a_plan_cannot_be_taken_out_before_it_is_dropped() -> None:
    core = scheduler()
    sequence = running(core, make("a", list(range(6))))
    running(core, make("b", [1]))
    before = (sequence.num_computed, sequence.num_in_flight)
    plan = core.schedule()
    with pytest.raises(IntegrityError, match="1 tokens in flight"):
        core.take_out(sequence)
    core.drop(plan, sequence)
    core.drop(plan, sequence)
    assert (sequence.num_computed, sequence.num_in_flight) == before
    core.take_out(sequence)
    core.patch(plan)
    assert [name for name, *_ in rows(plan)] == ["b"]


def test_a_prefill_chunk_in_a_plan_cannot_be_taken_out_either() -> None:
    core = scheduler(max_num_batched_tokens=4)
    sequence = make("a", list(range(6)))
    core.add(sequence)
    plan = core.schedule()
    with pytest.raises(IntegrityError, match="4 computed, 0 written"):
        core.take_out(sequence)
    core.drop(plan, sequence)
    core.take_out(sequence)
    assert sequence.block_table == []
    core.put_back(sequence)
    assert sequence.status is SequenceStatus.WAITING
    core.check_integrity()


def arrived(core: Scheduler, name: str, tokens: int) -> Sequence:
    """A sequence with KV of all its tokens but the last, as a migration leaves it."""
    sequence = make(name, list(range(tokens - 1)))
    sequence.tokens.append(9)
    blocks = core.pool.reserve(-(-(tokens - 1) // core.pool.block_size))
    assert blocks is not None
    core.check_integrity()
    core.pool.commit(blocks)
    core.check_integrity(blocks)
    sequence.block_table = blocks
    sequence.num_computed = sequence.num_written = tokens - 1
    sequence.num_cached = 0
    return sequence


def test_an_arrived_sequence_joins_the_plan_already_made() -> None:
    core = scheduler(max_num_batched_tokens=4)
    core.add(make("long", list(range(40, 60))))
    step(core)
    plan = core.schedule()
    assert rows(plan) == [("long", 4, 4, False)]
    sequence = arrived(core, "a", 7)
    core.insert(sequence)
    core.patch(plan)
    # The budget was used up: the prefill gives a token back.
    assert rows(plan) == [("a", 6, 1, True), ("long", 4, 3, False)]
    core.complete(plan, [9])
    core.check_integrity()
    # Its full blocks are known to the prefix cache from its arrival on.
    turn = make("turn", [*range(6), 9, 9])
    core.abort("long")
    core.add(turn)
    step(core)
    assert turn.num_cached == 4


def test_an_insert_must_agree_with_its_blocks() -> None:
    core = scheduler()
    for counters in ({"num_computed": 7}, {"num_written": 5}, {"block_table": []}):
        sequence = arrived(core, "a", 7)
        held = sequence.block_table
        for name, value in counters.items():
            setattr(sequence, name, value)
        with pytest.raises(ValueError, match="cannot run"):
            core.insert(sequence)
        core.pool.release(held)
    core.insert(arrived(core, "a", 7))
    with pytest.raises(ValueError, match="already here"):
        core.insert(arrived(core, "a", 7))


def test_a_sequence_that_moved_away_leaves_its_prefix() -> None:
    core = scheduler()
    sequence = running(core, make("a", list(range(9))))
    core.take_out(sequence)
    core.finish(sequence, FinishReason.NOT_FINISHED)
    assert sequence.status is SequenceStatus.FINISHED
    assert core.pool.num_free == core.pool.num_usable
    assert core.pool.num_cached == 2
    with pytest.raises(IntegrityError, match="not a live sequence"):
        core.finish(sequence, FinishReason.ABORT)
    core.check_integrity()


@pytest.mark.parametrize("state", ["waiting", "running", "handover"])
def test_abort_works_in_every_state(state: str) -> None:
    core = scheduler()
    sequence = make("a", list(range(9)))
    if state == "waiting":
        core.add(sequence)
    else:
        running(core, sequence)
    if state == "handover":
        core.take_out(sequence)
    assert sequence.status == state
    core.abort("a")
    assert not core.sequences
    assert not core.has_work()
    assert core.pool.num_free == core.pool.num_usable
    core.check_integrity()


# ---- the check itself


def test_the_check_finds_a_leaked_block() -> None:
    core = scheduler()
    sequence = running(core, make("a", list(range(9))))
    sequence.block_table.pop()
    with pytest.raises(IntegrityError):
        core.check_integrity()


def test_the_check_counts_blocks_held_elsewhere() -> None:
    core = scheduler()
    running(core, make("a", list(range(9))))
    blocks = core.pool.allocate(2)
    assert blocks is not None
    core.check_integrity(blocks)
    core.check_integrity(dict.fromkeys(blocks, 1))
    with pytest.raises(IntegrityError, match="its holders count 0"):
        core.check_integrity()


@pytest.mark.parametrize("status", list(SequenceStatus))
def test_the_check_finds_a_sequence_in_the_wrong_queue(status: SequenceStatus) -> None:
    core = scheduler()
    sequence = running(core, make("a", list(range(9))))
    if status is SequenceStatus.RUNNING:
        core.running.append(sequence)
    else:
        sequence.status = status
    with pytest.raises(IntegrityError):
        core.check_integrity()
