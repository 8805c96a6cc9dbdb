"""Random models of known shapes on a device, and steps to run them with."""

from __future__ import annotations

import dataclasses
import gc
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from instance.config import EngineConfig, SchedulerConfig, SwapConfig
from instance.executor import Executor, StepBatch, StepResult
from instance.model.context import ATTENTION_NAME
from instance.request import SamplingParams

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "qwen3-0.6b": (
        Qwen3Config,
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151_936,
            "max_position_embeddings": 40_960,
            "tie_word_embeddings": True,
        },
    ),
    "llama-3.1-8b": (
        LlamaConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128_256,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": False,
            "rope_parameters": LLAMA3_ROPE,
        },
    ),
    "tiny": (
        LlamaConfig,
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 128,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
        },
    ),
}
"""Sizes as the models' own configurations give them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Size:
    """How much is run.

    Attributes:
        shape: One of SHAPES.
        device: "cuda" or "cpu".
        batches: Of decodes.
        context: Tokens of each decoding sequence.
        prefill: Tokens of a prompt.
        steps: Steps that are timed.
        copied: Bytes of a copy.
        max_num_seqs: Of the executor.
    """

    shape: str
    device: str
    batches: tuple[int, ...] = (1, 8, 32, 128, 256)
    context: int = 1024
    prefill: int = 8192
    steps: int = 40
    copied: int = 1 << 30
    max_num_seqs: int = 256

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32


def random_model(
    shape: str, device: str, dtype: torch.dtype, layers: int | None = None
) -> PreTrainedModel:
    """A model of a shape with random weights, made on the device; always the same one.

    Args:
        shape: One of SHAPES.
        device: Where its weights are.
        dtype: Theirs.
        layers: Instead of those of the shape.
    """
    config_class, sizes = SHAPES[shape]
    sizes = dict(sizes)
    if layers is not None:
        sizes["num_hidden_layers"] = layers
    config = config_class(**sizes, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=ATTENTION_NAME
        )
    model.requires_grad_(False)
    model.train(False)
    return model


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a decode step reads: all but an input table of its own."""
    tables = {id(one.weight) for one in (model.get_input_embeddings(),)}
    head = model.get_output_embeddings()
    tables.discard(id(head.weight))
    return sum(one.nbytes for one in model.parameters() if id(one) not in tables)


def settings(size: Size, **more: Any) -> EngineConfig:
    """Of an executor that takes every step of the bench."""
    longest = max(size.prefill, size.context + size.steps + 64)
    limits = SchedulerConfig(
        max_num_seqs=size.max_num_seqs,
        max_num_batched_tokens=max(size.prefill, size.max_num_seqs),
        max_model_len=longest,
    )
    if size.device == "cpu":
        per_row = -(-(size.context + size.steps + 64) // 16)
        needed = max(size.max_num_seqs * per_row, -(-longest // 16)) + 1
        more.setdefault("num_blocks", needed)
    return EngineConfig(
        model=size.shape,
        device=size.device,
        scheduler=limits,
        swap=SwapConfig(space_bytes=0),
        **more,
    )


@contextmanager
def executor_of(model: PreTrainedModel, config: EngineConfig) -> Iterator[Any]:
    """An executor, and afterwards the memory that it took."""
    from instance.model.cuda.runner import CudaExecutor

    made = CudaExecutor(model, None, config)
    try:
        yield made
    finally:
        made.close()
        del made
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def decode_steps(rows: int, context: int, steps: int, width: int) -> list[StepBatch]:
    """Steps of ``rows`` decodes whose contexts grow from ``context`` on; each takes its tokens
    from the step before.

    Args:
        rows: Sequences.
        context: Tokens of each with the first step.
        steps: How many.
        width: Blocks of a sequence; sequence i has those from 1 + i * width on.
    """
    tables = 1 + np.arange(rows * width, dtype=np.int64).reshape(rows, width)
    at = np.arange(rows)
    batches = []
    for step in range(steps):
        position = context - 1 + step
        used = -(-(position + 1) // 16)
        batches.append(
            StepBatch(
                number=step,
                token_ids=np.full(rows, 7, dtype=np.int64),
                positions=np.full(rows, position, dtype=np.int64),
                slots=tables[:, position // 16] * 16 + position % 16,
                query_starts=np.arange(rows + 1),
                context_lens=np.full(rows, position + 1, dtype=np.int64),
                block_tables=tables[:, :used],
                num_decodes=rows,
                sample_rows=at,
                sample_positions=np.full(rows, position + 1, dtype=np.int64),
                num_outputs=np.full(rows, step, dtype=np.int64),
                sampling=[SamplingParams(temperature=0.0)] * rows,
                stop_token_ids=[frozenset()] * rows,
                feeds={} if step == 0 else {i: i for i in range(rows)},
            )
        )
    return batches


def prefill_step(
    prompt: Sequence[int], start: int, count: int, first_block: int = 1, number: int = 0
) -> StepBatch:
    """A step of ``count`` positions of one prompt from ``start`` on; it draws a token."""
    positions = np.arange(start, start + count)
    table = first_block + np.arange(-(-(start + count) // 16), dtype=np.int64)[None]
    return StepBatch(
        number=number,
        token_ids=np.array(prompt[start : start + count], dtype=np.int64),
        positions=positions,
        slots=table[0, positions // 16] * 16 + positions % 16,
        query_starts=np.array([0, count]),
        context_lens=np.array([start + count]),
        block_tables=table,
        num_decodes=1 if count == 1 else 0,
        sample_rows=np.array([0]),
        sample_positions=np.array([start + count]),
        num_outputs=np.array([0]),
        sampling=[SamplingParams(temperature=0.0)],
        stop_token_ids=[frozenset()],
    )


def run_steps(
    executor: Executor, batches: Sequence[StepBatch]
) -> tuple[list[StepResult], list[float]]:
    """Launch steps one behind the other.

    Returns:
        What each gave, and when it was told, in seconds.

    Raises:
        RuntimeError: if one failed.
    """
    results: list[StepResult | BaseException] = []
    times: list[float] = []
    over = threading.Event()

    def done(result: StepResult | BaseException) -> None:
        times.append(time.perf_counter())
        results.append(result)
        if len(results) == len(batches):
            over.set()

    for batch in batches:
        executor.launch(batch, done)
    over.wait()
    found = []
    for result in results:
        if isinstance(result, BaseException):
            raise RuntimeError("a step failed") from result
        found.append(result)
    return found, times
