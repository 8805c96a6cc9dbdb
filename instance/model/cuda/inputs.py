"""A step's arrays on their way to the device: laid out on the host, taken apart there.

Whatever a step needs lies in one piece of pinned memory, so that it takes one copy to the
device (a decode step two: its block tables are padded to the width of the graph's there).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from instance.executor import StepBatch
from instance.model.cuda.attention import AttentionStep
from instance.model.cuda.sampling import NUM_FIELDS, SamplingFields, write_sampling
from instance.model.cuda.sizing import Ints, prefill_items

DECODE_FIELDS = 5 + NUM_FIELDS


@dataclass(slots=True)
class StepTensors:
    """A step on the device.

    Attributes:
        token_ids: [T]; what is fed counts for nothing here.
        feeds: [T] index of the last step's draw that is the token, or -1.
        positions: [T].
        attention: What the attention kernels read.
        kept: [K] positions of the output head, None for all.
        sampling: Of the K draws.
    """

    token_ids: Tensor
    feeds: Tensor
    positions: Tensor
    attention: AttentionStep
    kept: Tensor | None
    sampling: SamplingFields

    def tokens(self, last_tokens: Tensor) -> Tensor:
        """[T] input tokens, those that the last step drew included."""
        fed = last_tokens[self.feeds.clamp(min=0)]
        return torch.where(self.feeds >= 0, fed, self.token_ids)


def write_decode(batch: StepBatch, fields: Ints) -> None:
    """The fields of a step of decodes; rows beyond them are padding.

    Padding reads no KV (its context is empty), writes to the null block, draws greedily, and
    nobody looks at what.

    Args:
        batch: All its rows are decodes.
        fields: [DECODE_FIELDS, bucket] contiguous, bucket at least the number of rows.
    """
    rows = len(batch.context_lens)
    fields[:5] = 0
    fields[1] = -1
    fields[0, :rows] = batch.token_ids
    for at, draw in batch.feeds.items():
        fields[1, at] = draw
    fields[2, :rows] = batch.positions
    fields[3, :rows] = batch.slots
    fields[4, :rows] = batch.context_lens
    write_sampling(batch, fields[5:])


def decode_tensors(fields: Tensor, tables: Tensor, query_starts: Tensor) -> StepTensors:
    """What ``write_decode`` wrote, on the device.

    Args:
        fields: [DECODE_FIELDS, bucket].
        tables: [bucket, W] block tables.
        query_starts: [at least bucket + 1] 0, 1, 2, ...
    """
    bucket = fields.shape[1]
    return StepTensors(
        token_ids=fields[0],
        feeds=fields[1],
        positions=fields[2],
        attention=AttentionStep(
            slots=fields[3],
            tables=tables,
            context_lens=fields[4],
            query_starts=query_starts[: bucket + 1],
            num_decodes=bucket,
            items=None,
        ),
        kept=None,
        sampling=SamplingFields.of(fields[5:]),
    )


def kept_positions(batch: StepBatch) -> Ints:
    """[K] positions that the output head sees: those that draw.

    A step of prefill chunks alone draws nothing, but a head needs a row.
    """
    kept = batch.query_starts[batch.sample_rows + 1] - 1
    return kept if len(kept) else batch.query_starts[1:2] - 1


class MixedLayout:
    """Where the arrays of a step with prefill lie in one piece.

    Args:
        batch: The step.
        block_q: Query positions of a program of the prefill kernel.
    """

    def __init__(self, batch: StepBatch, block_q: int) -> None:
        self._batch = batch
        self._items = prefill_items(batch.query_starts, batch.num_decodes, block_q)
        self._kept = kept_positions(batch)
        positions, rows = len(batch.token_ids), len(batch.context_lens)
        self._shapes = [
            (4, positions),
            (rows + 1,),
            (rows,),
            self._items.shape,
            self._kept.shape,
            (NUM_FIELDS, len(self._kept)),
            batch.block_tables.shape,
        ]
        self.size = sum(int(np.prod(shape)) for shape in self._shapes)

    def write(self, memory: Ints) -> None:
        """Fill [size] integers."""
        batch = self._batch
        fields, starts, lens, items, kept, sampling, tables = self._parts(memory)
        fields[0] = batch.token_ids
        fields[1] = -1
        for at, draw in batch.feeds.items():
            fields[1, at] = draw
        fields[2] = batch.positions
        fields[3] = batch.slots
        starts[:] = batch.query_starts
        lens[:] = batch.context_lens
        items[:] = self._items
        kept[:] = self._kept
        write_sampling(batch, sampling)
        tables[:] = batch.block_tables

    def tensors(self, memory: Tensor) -> StepTensors:
        """The same piece on the device, taken apart."""
        fields, starts, lens, items, kept, sampling, tables = self._parts(memory)
        return StepTensors(
            token_ids=fields[0],
            feeds=fields[1],
            positions=fields[2],
            attention=AttentionStep(
                slots=fields[3],
                tables=tables,
                context_lens=lens,
                query_starts=starts,
                num_decodes=self._batch.num_decodes,
                items=items if len(items) else None,
            ),
            kept=kept,
            sampling=SamplingFields.of(sampling),
        )

    def _parts(self, memory: Any) -> list[Any]:
        """Views of ``memory``, an array or a tensor, in the shapes of the arrays."""
        found: list[Any] = []
        first = 0
        for shape in self._shapes:
            count = int(np.prod(shape))
            found.append(memory[first : first + count].reshape(shape))
            first += count
        return found
