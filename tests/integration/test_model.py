"""The executor against transformers' own generate, in float64."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
)

from instance.config import EngineConfig, SchedulerConfig
from instance.executor import StepBatch
from instance.model.runner import TorchExecutor
from instance.request import Request, Row, SamplingParams, Sequence, StepPlan
from tests.integration.models import make_tiny_model
from tests.integration.stepping import Stepper, run_batch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(folder: Path, num_blocks: int = 256, block_size: int = 4) -> TorchExecutor:
    return TorchExecutor(
        EngineConfig(
            model=str(folder), dtype="float64", num_blocks=num_blocks, block_size=block_size
        )
    )


def reference(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def generate(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    settings = GenerationConfig(do_sample=False, max_new_tokens=count)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return [int(token) for token in out[0, len(prompt) :]]


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(32, 127) for _ in range(length)] for length in lengths]


def spoil(executor: TorchExecutor) -> None:
    """Fill the whole pool, the null block included, with NaN."""
    assert executor.kv is not None
    executor.kv.write(0, 0, b"\xff" * (executor.kv.block_bytes * executor.num_blocks))


def greedy(count: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3"])
def test_same_tokens_as_generate(arch: str, tmp_path: Path) -> None:
    """Chunked prefill beside decodes, in a pool of NaN, arrivals spread over the steps."""
    folder = make_tiny_model(tmp_path, arch)
    executor = start(folder)
    spoil(executor)
    stepper = Stepper(executor, chunk=16)
    asked = prompts([3, 40, 17, 70, 1, 29])
    running = []
    for prompt in asked:
        running.append(stepper.add(prompt, greedy(30)))
        for _ in range(4):
            stepper.step()
    stepper.run()
    executor.close()
    model = reference(folder)
    for prompt, sequence in zip(asked, running, strict=True):
        assert sequence.output == generate(model, prompt, 30)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_moved_blocks(arch: str, tmp_path: Path) -> None:
    """KV bytes copied to other blocks mid-way, in prefill and in decode; the old ones NaN."""
    folder = make_tiny_model(tmp_path, arch)
    executor = start(folder)
    spoil(executor)
    stepper = Stepper(executor, chunk=16)
    asked = prompts([40, 9, 33])
    running = [stepper.add(prompt, greedy(25)) for prompt in asked]
    for _ in range(12):
        stepper.step()
        for sequence in running:
            stepper.move(sequence)
    stepper.run()
    executor.close()
    model = reference(folder)
    for prompt, sequence in zip(asked, running, strict=True):
        assert sequence.output == generate(model, prompt, 25)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_very_different_lengths(arch: str, tmp_path: Path) -> None:
    """Contexts from a few tokens to many hundreds, which are not gathered at one width."""
    folder = make_tiny_model(tmp_path, arch)
    executor = start(folder, num_blocks=1024)
    spoil(executor)
    stepper = Stepper(executor, chunk=256)
    asked = prompts([600, 5, 350, 90, 6, 601])
    running = [stepper.add(prompt, greedy(8)) for prompt in asked]
    stepper.run()
    executor.close()
    model = reference(folder)
    for prompt, sequence in zip(asked, running, strict=True):
        assert sequence.output == generate(model, prompt, 8)


def test_blocks_of_a_finished_sequence_are_reused(tmp_path: Path) -> None:
    """Stale KV of another sequence, and then NaN, lie behind the new one's context."""
    folder = make_tiny_model(tmp_path, "llama")
    executor = start(folder, num_blocks=24)
    model = reference(folder)
    stepper = Stepper(executor, chunk=16)
    for round_number in range(3):
        asked = prompts([21, 6], seed=round_number)
        running = [stepper.add(prompt, greedy(10)) for prompt in asked]
        stepper.run()
        for prompt, sequence in zip(asked, running, strict=True):
            assert sequence.output == generate(model, prompt, 10)
            stepper.finish(sequence)
        if round_number == 1:
            spoil(executor)
    executor.close()


def test_sampled_stream_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "llama")
    executor = start(folder)
    asked = prompts([12, 30, 7])
    settings = [
        SamplingParams(temperature=0.9, seed=5, max_tokens=30),
        SamplingParams(temperature=1.3, top_k=20, seed=6, max_tokens=30),
        SamplingParams(temperature=0.8, top_p=0.9, min_p=0.02, seed=7, max_tokens=30),
    ]
    together = Stepper(executor, chunk=8)
    running = [together.add(p, one) for p, one in zip(asked, settings, strict=True)]
    together.run()
    for prompt, params, sequence in zip(asked, settings, running, strict=True):
        alone = Stepper(executor, chunk=100, seed=1)
        single = alone.add(prompt, params)
        alone.run()
        assert single.output == sequence.output
    executor.close()


def test_description_and_pool_size(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny", "gemma3", dtype="float32", max_len=512)
    stages: list[str] = []
    executor = TorchExecutor(
        EngineConfig(
            model=str(folder),
            block_size=8,
            kv_cache_memory_bytes=1 << 20,
            scheduler=SchedulerConfig(max_model_len=8192),
        ),
        stages.append,
    )
    described = executor.description
    assert stages == ["loading weights", "warming up"]
    assert (described.name, described.dtype) == ("tiny", "float32")
    assert (described.num_layers, described.num_kv_heads, described.head_dim) == (3, 2, 16)
    assert described.max_model_len == 512
    assert described.eos_token_ids == (257, 259)
    assert executor.kv is not None
    assert executor.kv.block_bytes == 3 * 2 * 8 * 2 * 16 * 4
    assert executor.num_blocks == (1 << 20) // executor.kv.block_bytes
    executor.close()
    with pytest.raises(ValueError, match="too small"):
        TorchExecutor(EngineConfig(model=str(folder), kv_cache_memory_bytes=1000))
    with pytest.raises(ValueError, match="dtype"):
        TorchExecutor(EngineConfig(model=str(folder), dtype="float8"))
    with pytest.raises(ValueError, match="device"):
        TorchExecutor(EngineConfig(model=str(folder), device="tpu"))


def test_a_failing_step_is_answered_and_the_next_one_runs(tmp_path: Path) -> None:
    executor = start(make_tiny_model(tmp_path, "llama"))
    sequence = Sequence.start(Request("r", (65, 66, 67), greedy(4)))
    sequence.block_table = [1]
    plan = StepPlan(0, [Row(sequence, 0, 3, True)])
    broken = StepBatch.build(plan, 4)
    broken.token_ids = np.array([65, 66, 10_000_000])
    with pytest.raises(IndexError):
        run_batch(executor, broken)
    good = run_batch(executor, StepBatch.build(plan, 4))
    assert len(good.tokens) == 1
    assert 0 < good.model_duration <= good.duration
    executor.close()


def test_steps_end_in_the_order_of_their_launch(tmp_path: Path) -> None:
    executor = start(make_tiny_model(tmp_path, "llama"))
    ended: list[tuple[int, str]] = []
    all_done = threading.Event()
    for number, length in enumerate((60, 1, 30, 2)):
        sequence = Sequence.start(Request("r", tuple(range(40, 40 + length)), greedy(4)))
        sequence.block_table = list(range(1, 16))
        batch = StepBatch.build(StepPlan(number, [Row(sequence, 0, length, number % 2 == 0)]), 4)

        def done(_: object, number: int = number) -> None:
            ended.append((number, threading.current_thread().name))
            if len(ended) == 4:
                all_done.set()

        executor.launch(batch, done)
    assert all_done.wait(60)
    assert ended == [(number, "executor") for number in range(4)]
    executor.close()
    with pytest.raises(RuntimeError, match="closed"):
        executor.launch(batch, done)
    assert not executor._thread.is_alive()
