"""Drives an attention backend alone, beside a dense reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from instance.executor import StepBatch
from instance.kv.copier import TensorKvPool
from instance.model.attention import PagedAttention
from instance.model.attention_cpu import CpuAttention
from instance.model.context import AttentionOptions
from instance.request import Request, Row, SamplingParams, Sequence, StepPlan

LAYERS, SIZE, KV_HEADS, HEADS, DIM = 2, 4, 2, 6, 8


class Paged:
    """Sequences with known K and V, stored by steps through the attention under test.

    Args:
        num_blocks: Of the pool, which is full of NaN.
        seed: Of all that is drawn.
        make: Makes the attention from the pool.
        dtype: Of the pool.
        shape: Heads, KV heads, size of a head, and block size.
    """

    def __init__(
        self,
        num_blocks: int = 400,
        seed: int = 0,
        make: Callable[[Tensor], PagedAttention] = CpuAttention,
        dtype: torch.dtype = torch.float64,
        shape: tuple[int, int, int, int] = (HEADS, KV_HEADS, DIM, SIZE),
    ) -> None:
        self.heads, self.kv_heads, self.dim, self.size = shape
        pool = (num_blocks, LAYERS, 2, self.size, self.kv_heads, self.dim)
        self.kv = torch.full(pool, torch.nan, dtype=dtype)
        self.attention = make(self.kv)
        self.pool = TensorKvPool(self.kv, self.attention.written)
        self.random = torch.Generator().manual_seed(seed)
        self.free = torch.randperm(num_blocks - 1, generator=self.random).add(1).tolist()
        self.known: dict[Sequence, Tensor] = {}

    def sequence(self, length: int) -> Sequence:
        """A sequence of known K and V, [layers, 2, length, heads, dim]; nothing is stored."""
        sequence = Sequence.start(Request("r", tuple(range(length)), SamplingParams()))
        self.known[sequence] = self.normal(LAYERS, 2, length, self.kv_heads, self.dim)
        sequence.block_table = [self.free.pop() for _ in range(-(-length // self.size))]
        return sequence

    def normal(self, *shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=self.random, dtype=torch.float64)
        return drawn.to(self.kv.dtype)

    def step(self, rows: list[Row], options: AttentionOptions) -> list[list[Tensor]]:
        """Run a step through all layers; per layer and row the output and the reference."""
        self.attention.prepare(StepBatch.build(StepPlan(0, rows), self.size))
        worst = []
        for layer in range(LAYERS):
            query = self.normal(1, self.heads, sum(row.length for row in rows), self.dim)
            parts = [
                self.known[row.sequence][layer, :, row.start : row.start + row.length]
                for row in rows
            ]
            key, value = torch.cat(parts, dim=1).transpose(1, 2)[:, None]
            found = self.attention.attend(layer, query, key, value, options)[0]
            first = 0
            for row in rows:
                end = row.start + row.length
                expected = dense(
                    query[0, :, first : first + row.length].double(),
                    self.known[row.sequence][layer, :, :end].double(),
                    row.start,
                    options,
                )
                worst.append([found[first : first + row.length], expected])
                first += row.length
        return worst

    def check(
        self, rows: list[Row], options: AttentionOptions, tolerance: float = 1e-9
    ) -> list[Tensor]:
        """Compare a step's outputs with the reference; the outputs."""
        found = self.step(rows, options)
        for output, expected in found:
            assert output.dtype == self.kv.dtype
            torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
        return [output for output, _ in found]

    def stored(self, sequence: Sequence, length: int) -> Tensor:
        """What the pool holds of a sequence, as ``known`` has it."""
        blocks = self.kv[sequence.block_table].transpose(0, 1).transpose(1, 2)
        return blocks.flatten(2, 3)[:, :, :length]


def dense(query: Tensor, kv: Tensor, start: int, options: AttentionOptions) -> Tensor:
    """[T, heads, dim] of queries [heads, T, dim] from position ``start`` on, term by term."""
    key, value = (
        one.repeat_interleave(len(query) // kv.shape[2], dim=1).transpose(0, 1) for one in kv
    )
    scores = query @ key.transpose(1, 2) * options.scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    at, keys = torch.arange(start, start + query.shape[1])[:, None], torch.arange(key.shape[1])
    visible = keys <= at
    if options.sliding_window is not None:
        visible &= keys > at - options.sliding_window
    weights = torch.exp(scores) * visible
    total = weights.sum(-1, keepdim=True)
    if options.sinks is not None:
        total = total + torch.exp(options.sinks)[:, None, None]
    return (weights / total @ value).transpose(0, 1)


def row(sequence: Sequence, start: int, count: int) -> Row:
    return Row(sequence, start, count, True)
