"""The executor of a GPU, on the CPU under Triton's interpreter: all but streams and graphs."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from instance.config import EngineConfig, SchedulerConfig
from instance.executor import StepBatch
from instance.model.context import AttentionOptions, forward_context
from instance.model.runner import TorchExecutor
from instance.request import Request, Row, SamplingParams, Sequence, StepPlan
from tests.integration.models import make_tiny_model
from tests.integration.running import Running
from tests.integration.stepping import run_batch

pytest.importorskip("triton")

from instance.model.cuda import compiled
from instance.model.cuda.memory import largest_batch
from instance.model.cuda.pool import DeviceKvPool
from instance.model.cuda.runner import CudaExecutor

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU only"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m"
    return make_tiny_model(path, "qwen3", "float32", layers=2, hidden=32, max_len=64)


def plain_model(folder: Path) -> PreTrainedModel:
    """Without the parts that a model on the CPU is given."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="drover", dtype=torch.float32
    )
    return model.requires_grad_(False)


def settings(folder: Path) -> EngineConfig:
    return EngineConfig(
        model=str(folder),
        dtype="float32",
        block_size=4,
        num_blocks=40,
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=12, max_model_len=64),
    )


@pytest.fixture
def executor(folder: Path) -> Iterator[CudaExecutor]:
    made = CudaExecutor(plain_model(folder), folder, settings(folder))
    yield made
    made.close()


async def tokens_of(executor: Any, config: EngineConfig) -> dict[str, list[int]]:
    running = Running(executor, config)
    running.submit("greedy", [40, 50, 60], 5)
    running.submit("chunked", list(range(33, 55)), 4)
    running.submit("sampled", [70, 80, 90, 91], 5, temperature=0.9, seed=5, logprobs=2)
    running.submit("bounded", [71, 81], 3, presence_penalty=1.0, min_tokens=2)
    running.submit("late", [99, 98, 97], 3, temperature=1.2, top_p=0.9, top_k=30, seed=6)
    await running.done()
    return running.tokens


async def test_the_engine_gives_the_tokens_of_the_cpu(folder: Path, executor: CudaExecutor) -> None:
    config = settings(folder)
    plain = TorchExecutor(config)
    try:
        expected = await tokens_of(plain, config)
    finally:
        plain.close()
    fed: list[int] = []
    launch = executor.launch

    def counted(batch: StepBatch, done: Any) -> None:
        fed.append(len(batch.feeds))
        launch(batch, done)

    executor.launch = counted  # type: ignore[method-assign]
    assert await tokens_of(executor, config) == expected
    assert sum(fed) > 0


async def test_an_impossible_token_fails_the_step_and_not_the_device(
    folder: Path, executor: CudaExecutor
) -> None:
    running = Running(executor, settings(folder))
    running.submit("bad", [10**9, 5], 4)
    with pytest.raises(IndexError, match="vocabulary"):
        await running.done()
    await asyncio.sleep(0)


class NoWaiting(TorchFunctionMode):
    """Refuses what makes the host wait for a value on the device."""

    WAITS = frozenset(
        {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "equal"}
    )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        assert func.__name__ not in self.WAITS, func.__name__
        return func(*args, **(kwargs or {}))


def decodes(executor: CudaExecutor, count: int) -> StepBatch:
    """A step of decodes; the pool holds zeros."""
    rows = []
    for index in range(count):
        request = Request(f"r{index}", (50 + index,) * 6, SamplingParams(seed=index))
        sequence = Sequence.start(request)
        sequence.block_table = [1 + 2 * index, 2 + 2 * index]
        rows.append(Row(sequence, 5, 1, True))
    return StepBatch.build(StepPlan(0, rows), 4)


def test_a_decode_step_waits_for_nothing(executor: CudaExecutor) -> None:
    batch = decodes(executor, 3)
    with executor._working(), NoWaiting():
        logits, _ = executor._decode.run(batch, executor._decode.staging())
    assert logits.shape[0] == 4
    for wait in (Tensor.item, bool, float):
        with pytest.raises(AssertionError, match=r"item|__bool__|__float__"), NoWaiting():
            wait(logits[0, 0])


def test_padding_of_a_decode_step_leaves_the_pool_alone(executor: CudaExecutor) -> None:
    assert executor.kv is not None
    junk = b"\x7f" * executor.kv.block_bytes
    for block in range(7, 40):
        executor.kv.write(block, 0, junk)
    with executor._working():
        executor._decode.run(decodes(executor, 3), executor._decode.staging())
    assert bytes(executor.kv.read(7, 33)) == junk * 33
    # Each of the three wrote the second position of its second block.
    assert bytes(executor.kv.read(6, 1)) != bytes(executor.kv.block_bytes)
    assert bytes(executor.kv.read(5, 1)) == bytes(executor.kv.block_bytes)


def test_pool_bytes() -> None:
    kv = torch.randn(6, 2, 2, 4, 1, 8).to(torch.bfloat16)
    pool = DeviceKvPool(kv)
    before = kv.clone()
    data = pool.read(1, 2)
    assert data.readonly
    assert len(data) == 2 * pool.block_bytes == before[1:3].nbytes
    kv[1:3] = 0
    # A copy: what is written later does not change it.
    pool.write(3, 0, data[:100])
    pool.write(3, 100, bytes(data[100:]))
    pool.write(3, 0, b"")
    assert torch.equal(kv[3:5], before[1:3])
    assert torch.equal(kv[5], before[5])
    for block, count in ((-1, 1), (6, 1), (5, 2), (0, -1)):
        with pytest.raises(IndexError):
            pool.read(block, count)
    for block, offset, size in ((5, 1, pool.block_bytes), (-1, 0, 4), (0, -4, 4), (6, 0, 1)):
        with pytest.raises(IndexError):
            pool.write(block, offset, b"x" * size)
    with pytest.raises(ValueError, match="contiguous"):
        DeviceKvPool(torch.zeros(4, 4).T)


@pytest.mark.parametrize(("tokens", "rows"), [(512, 64), (7, 3), (3, 8), (64, 64)])
def test_the_largest_step_has_all_tokens_and_a_draw_in_every_row(tokens: int, rows: int) -> None:
    batch = largest_batch(tokens, rows, 4)
    counts = np.diff(batch.query_starts)
    assert len(batch.token_ids) == counts.sum() == tokens
    assert len(batch.sample_rows) == len(counts) == min(tokens, rows)
    assert counts.min() >= 1
    assert np.array_equal(batch.context_lens, counts)
    assert (batch.positions < np.repeat(counts, counts)).all()
    assert batch.block_tables.shape[1] * 4 >= counts.max()
    assert len(batch.sampling) == len(counts)


class Summing:
    """An attention that mixes what it is given, the number of the layer included."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        group = query.shape[1] // value.shape[1]
        mixed = query * (layer + 1) + value.repeat_interleave(group, dim=1)
        return (mixed * options.scaling).transpose(1, 2)


def graphs() -> int:
    """Pieces of code that were compiled in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_compiled_layers_compute_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The compiler's own back end needs a toolchain; what is traced is the same.
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    model = plain_model(folder)

    def logits(count: int) -> Tensor:
        ids = torch.arange(40, 40 + count)[None]
        with torch.inference_mode(), forward_context(Summing()):
            return model(input_ids=ids, position_ids=ids - 40, use_cache=False).logits

    expected = [logits(count) for count in (5, 9)]
    compiled.compile_layers(model)
    traced = graphs()
    found = [logits(count) for count in (5, 9)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    # One graph for all layers and lengths.
    assert graphs() - traced == 1


def test_steps_of_a_compiled_model_share_their_code(
    folder: Path, executor: CudaExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    traced = graphs()
    config = dataclasses.replace(settings(folder), compile=True)
    shared = CudaExecutor(plain_model(folder), folder, config)
    try:
        for count in (3, 2):
            batch = decodes(executor, count)
            expected = run_batch(executor, batch).tokens
            assert run_batch(shared, batch).tokens.tolist() == expected.tolist()
    finally:
        shared.close()
    # Compiled on the executor's thread: once, not for each layer or size.
    assert graphs() - traced == 1
