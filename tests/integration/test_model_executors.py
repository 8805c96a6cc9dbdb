"""Byte access to the pool, and the executor without a model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from instance.clock import VirtualClock
from instance.executor import ModelDescription, StepBatch, StepResult
from instance.kv.copier import TensorKvPool
from instance.model.modelled import ModelledExecutor
from instance.request import Request, Row, SamplingParams, Sequence, StepPlan
from instance.step_cost import StepCost

SHAPE = (6, 2, 2, 4, 1, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_pool_bytes(dtype: torch.dtype) -> None:
    kv = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    told: list[tuple[int, int]] = []
    pool = TensorKvPool(kv, lambda block, count: told.append((block, count)))
    assert pool.block_bytes == 2 * 2 * 4 * 8 * dtype.itemsize
    view = pool.read(1, 2)
    assert view.readonly
    assert len(view) == 2 * pool.block_bytes
    before = kv.clone()
    pool.write(4, 0, view)
    assert torch.equal(kv[4:6], before[1:3])
    assert torch.equal(kv[:4], before[:4])
    # A view is live: no copy was made.
    kv[1:3] = 1
    pool.write(3, 0, view)
    assert bool((kv[3:5] == 1).all())
    # In pieces, across the border of two blocks.
    data = bytes(view)
    cut = pool.block_bytes + 24
    kv[3:5] = 0
    pool.write(3, 0, data[:cut])
    pool.write(3, cut, memoryview(data)[cut:])
    assert bool((kv[3:5] == 1).all())
    assert told == [(4, 2), (3, 2), (3, 2), (4, 1)]


def test_pool_borders() -> None:
    kv = torch.zeros(SHAPE)
    pool = TensorKvPool(kv)
    for block, count in ((-1, 1), (6, 1), (5, 2), (0, -1)):
        with pytest.raises(IndexError):
            pool.read(block, count)
    for block, offset, size in ((5, 1, pool.block_bytes), (-1, 0, 4), (0, -4, 4), (6, 0, 1)):
        with pytest.raises(IndexError):
            pool.write(block, offset, b"x" * size)
    assert not kv.any()
    assert len(pool.read(6, 0)) == 0
    with pytest.raises(ValueError, match="contiguous"):
        TensorKvPool(torch.zeros(4, 4).T)


DESCRIPTION = ModelDescription(
    name="modelled",
    dtype="float32",
    block_size=4,
    num_layers=2,
    num_kv_heads=1,
    head_dim=8,
    vocab_size=50,
    max_model_len=256,
    eos_token_ids=(7, 8, 9),
)


def batch(*rows: tuple[int, int, int]) -> StepBatch:
    """A step of (context before, positions, seed) rows that all sample."""
    made = []
    for start, count, seed in rows:
        request = Request("r", tuple(range(start + count)), SamplingParams(seed=seed))
        sequence = Sequence.start(request)
        sequence.block_table = list(range(1, 80))
        made.append(Row(sequence, start, count, True))
    return StepBatch.build(StepPlan(0, made), 4)


def test_steps_take_what_the_cost_says_one_after_the_other() -> None:
    clock = VirtualClock(start=5.0)
    cost = StepCost(base=1.0, prefill_token=0.1, decode_sequence=0.25, context_token=0.01)
    executor = ModelledExecutor(DESCRIPTION, 64, clock, cost)
    assert executor.kv is None
    ended: list[tuple[str, float]] = []

    def launch(name: str, step: StepBatch) -> None:
        def done(result: StepResult | BaseException) -> None:
            assert isinstance(result, StepResult)
            ended.append((name, clock.now()))

        executor.launch(step, done)

    # 1 + 2 decodes of 0.25 + 20 KV positions of 0.01; then 1 + 30 prefill tokens of 0.1.
    launch("decodes", batch((9, 1, 0), (9, 1, 0)))
    launch("prefill", batch((0, 30, 0)))
    clock.run_until(20.0)
    launch("late", batch((0, 10, 0)))
    clock.run_until(30.0)
    names, times = zip(*ended, strict=True)
    assert names == ("decodes", "prefill", "late")
    assert times == pytest.approx((6.7, 10.7, 22.0))


def test_modelled_tokens() -> None:
    """A function of (seed, position) inside the vocabulary, and never one that ends."""
    clock = VirtualClock()
    executor = ModelledExecutor(DESCRIPTION, 64, clock, StepCost())
    results: list[StepResult | BaseException] = []
    for seed, position in itertools.product(range(10), range(0, 60)):
        executor.launch(batch((position, 1, seed)), results.append)
    while clock.run_next():
        pass
    tokens = np.concatenate([one.tokens for one in results if isinstance(one, StepResult)])
    assert len(tokens) == 600
    assert set(tokens.tolist()) == set(range(50)) - {7, 8, 9}
    results.clear()
    executor.launch(batch((0, 20, 1), (30, 1, 4)), results.append)
    clock.run_next()
    assert isinstance(results[0], StepResult)
    assert results[0].tokens.tolist() == [tokens[1 * 60 + 19], tokens[4 * 60 + 30]]


def test_modelled_close_abandons_steps() -> None:
    clock = VirtualClock()
    executor = ModelledExecutor(DESCRIPTION, 64, clock, StepCost())
    results: list[StepResult | BaseException] = []
    executor.launch(batch((0, 5, 1)), results.append)
    executor.close()
    while clock.run_next():
        pass
    assert results == []
    with pytest.raises(RuntimeError, match="closed"):
        executor.launch(batch((0, 5, 1)), results.append)
