"""Attention over the block-major KV pool on the CPU, by one compiled kernel per layer."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from instance.executor import Ints, StepBatch
from instance.model.context import AttentionOptions
from instance.model.kernels.attention import DTYPES, attention
from instance.model.kernels.launch import kernel
from instance.model.kernels.paged import MAX_HEAD_DIM, MAX_LANES, Attention

ENDLESS = 1 << 40
"""A window that hides nothing."""
ITEMS_PER_THREAD = 4
"""Rows are split by heads if there are fewer items of work."""


class CompiledAttention:
    """Paged attention by a kernel that reads the pool in place; an ``AttentionBackend``.

    What the pool holds beyond a row's context is never read. ``of_layer`` and ``of_step`` are
    for those that run the kernel among others.

    Args:
        kv: [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim].
        num_heads: Of queries.

    Raises:
        ValueError: if the kernel cannot do it.
    """

    def __init__(self, kv: Tensor, num_heads: int) -> None:
        self._num_layers, _, self._block_size, self._num_kv_heads, self._head_dim = kv.shape[1:]
        if (
            kv.dtype not in DTYPES
            or self._head_dim % 16
            or self._head_dim > MAX_HEAD_DIM
            or num_heads > MAX_LANES * self._num_kv_heads
        ):
            raise ValueError("no kernel for this type or shape")
        self._run = kernel(attention(kv.dtype, self._head_dim))
        self._num_heads = num_heads
        self._layers = [kv[0, layer].data_ptr() for layer in range(self._num_layers)]
        self._strides = (kv.stride(0), kv.stride(2))
        # Held, since the kernel is given addresses.
        self._kv = kv
        self._batch: StepBatch | None = None
        self._items: Ints = np.empty((0, 0), dtype=np.int64)
        self._settings: dict[tuple[float, float | None], np.ndarray] = {}

    def written(self, block: int, count: int) -> None:
        """Blocks were written from outside of a step: nothing of them is remembered."""

    def prepare(self, batch: StepBatch) -> None:
        """Take up a step; its layers follow."""
        self._batch = batch
        self._items = self._plan(batch)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        """See ``AttentionBackend.attend``."""
        query, key, value = (
            one if one.stride(-1) == 1 else one.contiguous() for one in (query, key, value)
        )
        out = query.new_empty(1, query.shape[2], self._num_heads, self._head_dim)
        sinks = None if options.sinks is None else options.sinks.float().contiguous()
        arguments = Attention(
            counter=0,
            query=query.data_ptr(),
            query_head=query.stride(1),
            query_step=query.stride(2),
            key=key.data_ptr(),
            key_head=key.stride(1),
            key_step=key.stride(2),
            value=value.data_ptr(),
            value_head=value.stride(1),
            value_step=value.stride(2),
            out=out.data_ptr(),
            sinks=0 if sinks is None else sinks.data_ptr(),
            **self.of_step(),
            **self.of_layer(layer, options),
        )
        self._run(arguments)
        return out

    def of_layer(self, layer: int, options: AttentionOptions) -> dict[str, int]:
        """The arguments that are the same in all steps, but for sinks."""
        settings = self._settings.get((options.scaling, options.softcap))
        if settings is None:
            settings = np.array([options.scaling, options.softcap or 0], dtype=np.float32)
            self._settings[options.scaling, options.softcap] = settings
        return {
            "settings": settings.ctypes.data,
            "pool": self._layers[layer],
            "block_stride": self._strides[0],
            "half_stride": self._strides[1],
            "block_size": self._block_size,
            "num_heads": self._num_heads,
            "num_kv_heads": self._num_kv_heads,
            "head_dim": self._head_dim,
            "window": options.sliding_window or ENDLESS,
        }

    def of_step(self) -> dict[str, int]:
        """The arguments that are the same for all layers of the prepared step."""
        assert self._batch is not None
        tables = self._batch.block_tables
        return {
            "num_items": len(self._items),
            "items": self._items.ctypes.data,
            "tables": tables.ctypes.data,
            "table_width": tables.shape[1],
        }

    def _plan(self, batch: StepBatch) -> Ints:
        """The items of a step, the long ones first, so that threads end together."""
        starts, counts = batch.query_starts[:-1], np.diff(batch.query_starts)
        begins = batch.context_lens - counts
        length = max(1, MAX_LANES * self._num_kv_heads // self._num_heads)
        parts = -(-counts // length)
        rows = np.repeat(np.arange(len(counts)), parts)
        part = np.arange(len(rows)) - np.repeat(np.cumsum(parts) - parts, parts)
        first = starts[rows] + part * length
        last = np.minimum(first + length, starts[rows] + counts[rows])
        shift = begins[rows] - starts[rows]
        cost = (last - first) * (last + shift)
        order = np.argsort(-cost, kind="stable")
        threads = torch.get_num_threads()
        # An item of a single query holds the states of all its heads.
        at_once = length
        if len(rows) < ITEMS_PER_THREAD * threads and threads > 1:
            at_once = 1
        heads = [*range(0, self._num_kv_heads, at_once), self._num_kv_heads]
        common = (rows, first, last, shift, begins[rows])
        items = np.array(
            [
                (*common, np.full_like(rows, begin), np.full_like(rows, end))
                for begin, end in itertools.pairwise(heads)
            ]
        )
        # [heads, fields, rows] to [rows, heads, fields].
        ordered = np.ascontiguousarray(items[:, :, order].transpose(2, 0, 1), dtype=np.int64)
        return ordered.reshape(-1, items.shape[1])
