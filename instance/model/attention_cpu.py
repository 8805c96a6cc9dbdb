"""Attention over the block-major KV pool on the CPU, in plain torch.

Decode rows of similar length are gathered together into a workspace that is reused, and
attended at once with the query heads that share a KV head as the query length, so that KV
is never repeated. Prefill rows are attended one by one. All indices are computed once per
step and shared by the layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from instance.executor import Ints, StepBatch
from instance.model.context import AttentionOptions
from instance.model.dense_attention import dense_attention

BUCKET_BYTES = 4 << 20
"""KV bytes gathered at a time at most (a single row may need more): what stays in cache
between the gather and the attention."""
PADDING_SHARE = 0.1
"""A row that would be padded by more than this share of its bucket's length starts a new
bucket, if that saves at least PADDING_BLOCKS blocks."""
PADDING_BLOCKS = 4


class _Gather:
    """Which blocks to fetch from the pool, layer by layer, and how they lie in the workspace.

    Args:
        pool: [num_blocks * num_layers * 2, block_size * num_kv_heads * head_dim].
        tables: [rows, width] block ids.
        num_layers: Of the pool.
        workspace: Where they are gathered, large enough.
        shape: (block_size, num_kv_heads, head_dim).
    """

    def __init__(
        self,
        pool: Tensor,
        tables: Ints,
        num_layers: int,
        workspace: Tensor,
        shape: tuple[int, int, int],
    ) -> None:
        rows, width = tables.shape
        first = tables.ravel() * (2 * num_layers)
        both = torch.from_numpy(np.concatenate([first, first + 1]))
        self._pool = pool
        self._indices = (both + 2 * torch.arange(num_layers)[:, None]).unbind()
        self._gathered = workspace[: len(both) * pool.shape[1]].view(len(both), -1)
        positions = (2, rows, width * shape[0], *shape[1:])
        # [rows, width * block_size, num_kv_heads, head_dim] each.
        self.keys, self.values = self._gathered.view(positions).unbind()

    def fetch(self, layer: int) -> None:
        """Fill ``keys`` and ``values``, which hold until the next fetch of any other."""
        torch.index_select(self._pool, 0, self._indices[layer], out=self._gathered)


@dataclass(slots=True)
class _Bucket:
    """Decode rows attended at once: rows [first, last) in the order of the plan.

    key, value: [rows, num_kv_heads, length, head_dim] views of what ``gather`` fetches,
        padding included.
    mask: [rows, 1, 1, length] added to the scores, or None.
    """

    first: int
    last: int
    gather: _Gather
    key: Tensor
    value: Tensor
    mask: Tensor | None


@dataclass(slots=True)
class _Prefill:
    """One row with several positions: query positions [first, last) of the step.

    gather: Fetches K and V; None if the row starts its sequence, so that the layer's own K
        and V are all there is.
    skip, length: KV positions [skip, skip + length) of the gathered ones are attended.
    mask: [count, length] added to the scores, or None where plain causal is right.
    """

    first: int
    last: int
    gather: _Gather | None
    skip: int
    length: int
    mask: Tensor | None


@dataclass(slots=True)
class _Plan:
    """How to attend a step with one sliding window.

    order: [decodes] query positions of the decode rows in bucket order; None if they are
        the leading positions as they stand.
    """

    order: Tensor | None
    buckets: list[_Bucket]
    prefills: list[_Prefill]


class CpuAttention:
    """Paged attention for models that run on the CPU; an ``AttentionBackend``.

    Whatever stale bytes the pool holds, NaN included, positions beyond a row's context do
    not reach its output: padding points at the row's own last block, and the tail of that
    block is cleared when the row enters it or when it was written from outside.

    Args:
        kv: [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim].
    """

    def __init__(self, kv: Tensor) -> None:
        self._kv = kv
        self._num_layers, _, self._block_size, self._num_kv_heads, self._head_dim = kv.shape[1:]
        self._by_block = kv.view(-1, self._block_size * self._num_kv_heads * self._head_dim)
        self._by_slot = kv.view(-1, self._num_kv_heads * self._head_dim)
        self._block_bytes = 2 * self._by_block.shape[1] * kv.element_size()
        self._workspace = torch.empty(0, dtype=kv.dtype)
        self._clean = np.zeros(kv.shape[0], dtype=bool)
        self._plans: dict[int | None, _Plan] = {}
        # [2 * num_layers, T]: where K of layer 0 goes, V of layer 0, K of layer 1, ...
        self._slots: tuple[Tensor, ...] = ()
        self._halves = torch.arange(2 * self._num_layers)[:, None] * self._block_size
        self._batch: StepBatch | None = None

    def written(self, block: int, count: int) -> None:
        """Blocks [block, block + count) were written from outside of a step."""
        self._clean[block : block + count] = False

    def prepare(self, batch: StepBatch) -> None:
        """Take up a step; its layers follow."""
        self._batch = batch
        self._plans.clear()
        size = self._block_size
        base = batch.slots // size * (2 * self._num_layers * size) + batch.slots % size
        self._slots = (torch.from_numpy(base) + self._halves).unbind()
        self._clear_tails(batch)

    def _clear_tails(self, batch: StepBatch) -> None:
        """Clear what follows the context in the last block of each row."""
        rows = np.flatnonzero(batch.context_lens % self._block_size)
        used = batch.context_lens[rows] % self._block_size
        blocks = batch.block_tables[rows, batch.context_lens[rows] // self._block_size]
        counts = np.diff(batch.query_starts)[rows]
        entered = counts >= used
        for i in np.flatnonzero(entered | ~self._clean[blocks]):
            self._kv[blocks[i], :, :, used[i] :].zero_()
        self._clean[blocks] = True

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        """See ``AttentionBackend.attend``."""
        self._store(layer, key, value)
        plan = self._plans.get(options.sliding_window)
        if plan is None:
            plan = self._plans[options.sliding_window] = self._plan(
                options.sliding_window, query.dtype
            )
        queries = query[0].transpose(0, 1)
        if not plan.prefills and len(plan.buckets) == 1 and plan.order is None:
            return self._decode(layer, plan.buckets[0], queries, options)[None]
        out = query.new_empty(queries.shape)
        if plan.buckets:
            self._decode_all(layer, plan, queries, options, out)
        for row in plan.prefills:
            self._prefill(layer, row, query[0], key[0], value[0], options, out)
        return out[None]

    def _store(self, layer: int, key: Tensor, value: Tensor) -> None:
        width = self._by_slot.shape[1]
        for half, tensor in enumerate((key, value)):
            rows = tensor[0].transpose(0, 1).reshape(-1, width)
            self._by_slot.index_copy_(0, self._slots[2 * layer + half], rows)

    def _decode_all(
        self, layer: int, plan: _Plan, queries: Tensor, options: AttentionOptions, out: Tensor
    ) -> None:
        if plan.order is None:
            for bucket in plan.buckets:
                rows = slice(bucket.first, bucket.last)
                out[rows] = self._decode(layer, bucket, queries[rows], options)
            return
        ordered = queries[plan.order]
        parts = [
            self._decode(layer, bucket, ordered[bucket.first : bucket.last], options)
            for bucket in plan.buckets
        ]
        out[plan.order] = torch.cat(parts) if len(parts) > 1 else parts[0]

    def _decode(
        self, layer: int, bucket: _Bucket, queries: Tensor, options: AttentionOptions
    ) -> Tensor:
        """[rows, num_heads, head_dim] of a bucket's queries of the same shape."""
        bucket.gather.fetch(layer)
        count = bucket.last - bucket.first
        grouped = queries.view(count, self._num_kv_heads, -1, self._head_dim)
        sinks = options.sinks
        out = dense_attention(
            grouped,
            bucket.key,
            bucket.value,
            bucket.mask,
            options,
            None if sinks is None else sinks.view(self._num_kv_heads, -1, 1),
        )
        return out.reshape(queries.shape)

    def _prefill(
        self,
        layer: int,
        row: _Prefill,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: AttentionOptions,
        out: Tensor,
    ) -> None:
        if row.gather is None:
            key, value = key[:, row.first : row.last], value[:, row.first : row.last]
        else:
            row.gather.fetch(layer)
            positions = slice(row.skip, row.skip + row.length)
            key = row.gather.keys[0, positions].transpose(0, 1)
            value = row.gather.values[0, positions].transpose(0, 1)
        grouped = query[:, row.first : row.last].view(
            self._num_kv_heads, -1, row.last - row.first, self._head_dim
        )
        # Stride 0 lets the heads of a group share their K and V.
        shape = (self._num_kv_heads, grouped.shape[1], row.length, self._head_dim)
        sinks = options.sinks
        attended = dense_attention(
            grouped,
            key[:, None].expand(shape),
            value[:, None].expand(shape),
            row.mask,
            options,
            None if sinks is None else sinks.view(self._num_kv_heads, -1, 1, 1),
            causal=row.mask is None,
        )
        out[row.first : row.last] = attended.flatten(0, 1).transpose(0, 1)

    def _gather(self, tables: Ints) -> _Gather:
        """How to fetch the blocks of [rows, width] tables."""
        numel = 2 * tables.size * self._by_block.shape[1]
        if self._workspace.numel() < numel:
            # What has been planned keeps the smaller one until the step ends.
            self._workspace = torch.empty(numel + numel // 4, dtype=self._kv.dtype)
        return _Gather(
            self._by_block,
            tables,
            self._num_layers,
            self._workspace,
            (self._block_size, self._num_kv_heads, self._head_dim),
        )

    def _plan(self, window: int | None, dtype: torch.dtype) -> _Plan:
        batch = self._batch
        assert batch is not None
        counts = np.diff(batch.query_starts)
        single = np.flatnonzero(counts == 1)
        lens = batch.context_lens
        # The first position that the row's first query sees, in whole blocks.
        starts = lens - counts
        visible = np.zeros_like(lens) if window is None else np.maximum(0, starts - window + 1)
        first = visible // self._block_size
        blocks = -(-lens // self._block_size) - first
        if _needs_buckets(blocks[single], self._block_bytes):
            single = single[np.argsort(-blocks[single], kind="stable")]
        buckets = [
            self._bucket(batch, single, span, first, blocks, window, dtype)
            for span in _spans(blocks[single], self._block_bytes)
        ]
        positions = batch.query_starts[single]
        leading = np.array_equal(positions, np.arange(len(single)))
        return _Plan(
            order=None if leading else torch.from_numpy(positions),
            buckets=buckets,
            prefills=[
                self._prefill_row(batch, int(row), int(first[row]), window, dtype)
                for row in np.flatnonzero(counts > 1)
            ],
        )

    def _bucket(
        self,
        batch: StepBatch,
        single: Ints,
        span: slice,
        first: Ints,
        blocks: Ints,
        window: int | None,
        dtype: torch.dtype,
    ) -> _Bucket:
        rows = single[span]
        width = int(blocks[rows].max())
        columns = first[rows, None] + np.minimum(np.arange(width), blocks[rows, None] - 1)
        lens = batch.context_lens[rows] - first[rows] * self._block_size
        length = int(lens.max())
        at = np.arange(length)
        hidden = at >= lens[:, None]
        if window is not None:
            hidden |= at < lens[:, None] - window
        gather = self._gather(batch.block_tables[rows[:, None], columns])
        return _Bucket(
            first=span.start,
            last=span.stop,
            gather=gather,
            key=gather.keys[:, :length].transpose(1, 2),
            value=gather.values[:, :length].transpose(1, 2),
            mask=_additive(hidden[:, None, None], dtype) if hidden.any() else None,
        )

    def _prefill_row(
        self, batch: StepBatch, row: int, first: int, window: int | None, dtype: torch.dtype
    ) -> _Prefill:
        begin, end = int(batch.query_starts[row]), int(batch.query_starts[row + 1])
        context = int(batch.context_lens[row])
        start = context - (end - begin)
        skip = 0 if window is None else max(0, start - window + 1) - first * self._block_size
        key_first = first * self._block_size + skip
        mask = None
        if start > 0 or (window is not None and window < context):
            queries = np.arange(start, context)[:, None]
            keys = np.arange(key_first, context)
            hidden = keys > queries
            if window is not None:
                hidden |= keys <= queries - window
            mask = _additive(hidden, dtype)
        last = -(-context // self._block_size)
        return _Prefill(
            first=begin,
            last=end,
            gather=None if start == 0 else self._gather(batch.block_tables[None, row, first:last]),
            skip=skip,
            length=context - key_first,
            mask=mask,
        )


def _additive(hidden: np.ndarray, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(hidden.shape, dtype=dtype)
    return mask.masked_fill_(torch.from_numpy(hidden), -torch.inf)


def _needs_buckets(blocks: Ints, block_bytes: int) -> bool:
    """Whether rows of these block counts should be sorted and attended in parts."""
    if len(blocks) < 2:
        return False
    padded = int(blocks.max()) * len(blocks)
    return padded * block_bytes > BUCKET_BYTES or _wasteful(int(blocks.min()), int(blocks.max()))


def _wasteful(blocks: int, width: int) -> bool:
    return width - blocks > max(PADDING_BLOCKS, PADDING_SHARE * width)


def _spans(blocks: Ints, block_bytes: int) -> Iterator[slice]:
    """Cut rows, sorted by falling block count where it matters, into buckets."""
    first, width = 0, int(blocks.max(initial=0))
    for row in range(1, len(blocks)):
        count = row - first + 1
        if count * width * block_bytes > BUCKET_BYTES or _wasteful(int(blocks[row]), width):
            yield slice(first, row)
            first, width = row, int(blocks[row])
    if len(blocks) > 0:
        yield slice(first, len(blocks))
