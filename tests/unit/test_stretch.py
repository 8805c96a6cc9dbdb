"""Many decode steps at once leave everything as stepping does."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from instance.config import SchedulerConfig
from instance.kv.blocks import BlockPool
from instance.request import Request, SamplingParams, Sequence, StepPlan
from instance.scheduler import Scheduler

BLOCK_SIZE = 4
MAX_MODEL_LEN = 64


def token(request_id: str, index: int) -> int:
    return (hash_of(request_id) * 31 + index * 7) % 997


def hash_of(name: str) -> int:
    return sum(ord(letter) * (place + 1) for place, letter in enumerate(name))


class Loop:
    """The engine's order of calls, a step at a time."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.launched = self.launch(scheduler.schedule())
        self.planned = scheduler.schedule()

    def launch(self, plan: StepPlan) -> StepPlan:
        self.scheduler.patch(plan)
        return plan

    def step(self) -> None:
        drawn = [
            token(row.sequence.request_id, row.start + row.length - row.sequence.num_prompt)
            for row in self.launched.rows
            if row.samples
        ]
        self.scheduler.complete(self.launched, drawn)
        self.launched = self.launch(self.planned)
        self.planned = self.scheduler.schedule()

    def jump(self, steps: int) -> None:
        tokens = [
            [token(row.sequence.request_id, row.sequence.num_output + k) for k in range(steps)]
            for row in self.launched.rows
        ]
        self.scheduler.advance_decodes(self.launched, self.planned, steps, tokens)

    def steady(self, most: int = 1000) -> int:
        return self.scheduler.steady_steps(self.launched, self.planned, most)

    def state(self) -> dict[str, Any]:
        scheduler = self.scheduler
        return {
            "sequences": {
                name: (
                    one.status,
                    one.tokens,
                    one.block_table,
                    one.block_hashes[: one.sealed],
                    one.sealed,
                    (one.num_computed, one.num_written, one.num_in_flight),
                )
                for name, one in scheduler.sequences.items()
            },
            "plans": [
                (plan.number, [(row.sequence.request_id, *row[1:]) for row in plan.rows])
                for plan in (self.launched, self.planned)
            ],
            "running": [one.request_id for one in scheduler.running],
            "free": (scheduler.pool.num_free, scheduler.pool.num_cached),
            "runs": scheduler.pool.fragmentation(),
        }


def make(prompts: list[int], outputs: list[int], blocks: int, budget: int) -> Loop:
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=budget, max_model_len=MAX_MODEL_LEN),
        BlockPool(blocks + 1, BLOCK_SIZE),
    )
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        name = f"r{number}"
        scheduler.add(
            Sequence.start(
                Request(
                    request_id=name,
                    prompt=tuple(token(name, -index) for index in range(1, prompt + 1)),
                    params=SamplingParams(max_tokens=output),
                    arrival=float(number),
                )
            )
        )
    return Loop(scheduler)


@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 40)), min_size=1, max_size=6),
    blocks=st.integers(16, 60),
    budget=st.integers(8, 40),
    share=st.floats(0.0, 1.0),
)
def test_a_jump_equals_its_steps(
    lengths: list[tuple[int, int]], blocks: int, budget: int, share: float
) -> None:
    prompts, outputs = [p for p, _ in lengths], [o for _, o in lengths]
    stepping, jumping = (make(prompts, outputs, blocks, budget) for _ in range(2))
    for _ in range(200):
        if not stepping.scheduler.has_work():
            break
        steps = int(jumping.steady() * share)
        if steps:
            jumping.jump(steps)
            for _ in range(steps):
                preempted = [one.num_preemptions for one in stepping.scheduler.running]
                stepping.step()
                assert [one.num_preemptions for one in stepping.scheduler.running] == preempted
        else:
            stepping.step()
            jumping.step()
        assert jumping.state() == stepping.state()
        jumping.scheduler.check_integrity()
    assert not jumping.scheduler.has_work()


def test_long_stretches_are_seen_as_such() -> None:
    loop = make([5, 9], [30, 40], blocks=60, budget=40)
    while not loop.steady():
        loop.step()
    # Of 30 tokens one came with the prefill, and the last two plans have rows already.
    assert loop.steady() >= 25
    assert loop.steady(most=7) == 7


def test_a_stretch_ends_where_blocks_do() -> None:
    # 10 blocks of 4 tokens, two sequences that want 20 tokens each at most.
    loop = make([4, 4], [30, 30], blocks=10, budget=40)
    while not loop.steady():
        loop.step()
    steps = loop.steady()
    loop.jump(steps)
    assert loop.scheduler.pool.num_free < 2
    assert loop.steady() == 0
    preempted = 0
    while not preempted:
        loop.step()
        preempted = sum(one.num_preemptions for one in loop.scheduler.sequences.values())


def test_who_waits_is_looked_at_whenever_priorities_are_read() -> None:
    loop = make([4] * 9, [30] * 9, blocks=60, budget=40)
    for _ in range(20):
        loop.step()
        assert loop.scheduler.waiting
        assert loop.steady() < loop.scheduler.config.priority_interval
    assert any(loop.step() or loop.steady() for _ in range(8))


def test_nothing_is_steady_while_somebody_prefills() -> None:
    chunked = make([4, 40], [30, 4], blocks=60, budget=8)
    chunked.step()
    assert chunked.steady() == 0
