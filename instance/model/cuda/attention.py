"""Attention over the block-major KV pool by Triton's kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from instance.executor import StepBatch
from instance.model.context import AttentionOptions
from instance.model.cuda.attention_kernels import attend_kernel, combine_kernel, store_kernel
from instance.model.cuda.sizing import (
    MIN_TILE,
    Ints,
    Tiles,
    attention_tiles,
    num_splits,
    power_of_two,
    prefill_items,
)

ENDLESS = 1 << 30
"""A window that hides nothing."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED = (4, 227 << 10)
"""Multiprocessors and shared memory that are assumed where there is no GPU: few programs, since
Triton's interpreter runs them one by one."""


@dataclass(slots=True)
class AttentionStep:
    """What the kernels read of a step: integers of any width, on the pool's device.

    Attributes:
        slots: [T], where K and V go.
        tables: [R, W] block ids.
        context_lens: [R]; 0 is padding.
        query_starts: [R + 1].
        num_decodes: Leading rows of one position.
        items: [items, 2] of ``prefill_items``; None if there is no other row.
    """

    slots: Tensor
    tables: Tensor
    context_lens: Tensor
    query_starts: Tensor
    num_decodes: int
    items: Tensor | None


class TritonAttention:
    """Paged attention on a GPU; an ``AttentionBackend``.

    What the pool holds beyond a row's context is never read. Any strides will do.

    Args:
        kv: [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim].
        num_heads: Of queries.
        max_decodes: Decode rows of a step at most.
        splits: Parts of a decode row's KV; None chooses by the GPU.
        tiles: Of the decode and of the prefill kernel; None chooses by the GPU.

    Raises:
        ValueError: if the kernels do not know the type.
    """

    def __init__(
        self,
        kv: Tensor,
        num_heads: int,
        max_decodes: int = 256,
        splits: int | None = None,
        tiles: tuple[Tiles, Tiles] | None = None,
    ) -> None:
        if kv.dtype not in DTYPES:
            known = ", ".join(str(one).removeprefix("torch.") for one in DTYPES)
            raise ValueError(f"attention on CUDA knows {known}, not {kv.dtype}")
        _, num_layers, _, self._block_size, self._num_kv_heads, self._dim = kv.shape
        self._num_heads = num_heads
        group = num_heads // self._num_kv_heads
        multiprocessors, shared = _device(kv.device)
        self._splits = splits or num_splits(self._num_kv_heads, multiprocessors)
        self._decode, self._prefill = tiles or (
            attention_tiles(group, self._dim, kv.element_size(), shared, True),
            attention_tiles(group, self._dim, kv.element_size(), shared, False),
        )
        self._keys = [kv[:, layer, 0] for layer in range(num_layers)]
        self._values = [kv[:, layer, 1] for layer in range(num_layers)]
        self._strides = self._keys[0].stride()
        self._width = power_of_two(max(self._dim, MIN_TILE))
        parts = (max_decodes, num_heads, self._splits)
        self._maxima = torch.empty(parts, dtype=torch.float32, device=kv.device)
        self._sums = torch.empty_like(self._maxima)
        self._partial = self._maxima.new_empty((*parts, self._width))
        self._shape = {
            "HEADS": num_heads,
            "DIM": self._dim,
            "BLOCK_D": self._width,
        }
        self._widen = kv.device.type == "cpu" and kv.dtype == torch.bfloat16
        self._precision = "ieee" if kv.dtype == torch.float32 else "tf32"
        self._step: AttentionStep | None = None

    @property
    def block_q(self) -> int:
        """Query positions of a program of the prefill kernel."""
        return self._prefill.block_q

    def written(self, block: int, count: int) -> None:
        """Blocks were written from outside of a step: nothing of them is remembered."""

    def prepare(self, batch: StepBatch) -> None:
        """Take up a step; its layers follow."""
        decodes = batch.num_decodes
        items = prefill_items(batch.query_starts, decodes, self.block_q)

        def ours(values: Ints) -> Tensor:
            return torch.from_numpy(values).to(self._partial.device)

        self.use(
            AttentionStep(
                slots=ours(batch.slots),
                tables=ours(batch.block_tables),
                context_lens=ours(batch.context_lens),
                query_starts=ours(batch.query_starts),
                num_decodes=decodes,
                items=ours(items) if len(items) else None,
            )
        )

    def use(self, step: AttentionStep) -> None:
        """Take up a step whose tensors are on the device already."""
        if step.num_decodes > len(self._maxima):
            raise ValueError(f"{step.num_decodes} decode rows, room for {len(self._maxima)}")
        self._step = step

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        """See ``AttentionBackend.attend``."""
        step = self._step
        assert step is not None
        self.store(layer, key, value)
        out = query.new_empty(1, query.shape[2], self._num_heads, self._dim)
        if step.num_decodes:
            self._attend(layer, query, out, options, self._decode, self._splits)
        if step.items is not None:
            self._attend(layer, query, out, options, self._prefill, 1)
        return out

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """K and V [1, num_kv_heads, T, head_dim] to the slots of the step."""
        step = self._step
        assert step is not None
        store_kernel[(key.shape[2],)](
            key,
            value,
            self._keys[layer],
            self._values[layer],
            step.slots,
            *(key.stride(2), key.stride(1), key.stride(3)),
            *(value.stride(2), value.stride(1), value.stride(3)),
            *self._strides,
            BLOCK_SIZE=self._block_size,
            HEADS=self._num_kv_heads,
            BLOCK_H=power_of_two(self._num_kv_heads),
            DIM=self._dim,
            BLOCK_D=self._width,
        )

    def _attend(
        self,
        layer: int,
        query: Tensor,
        out: Tensor,
        options: AttentionOptions,
        tiles: Tiles,
        splits: int,
    ) -> None:
        step = self._step
        assert step is not None
        sinks = options.sinks
        given = sinks if sinks is not None else self._sums
        # A tensor that the kernel never reads stands for one that there is not.
        items = step.items if splits == 1 and step.items is not None else step.tables
        count = len(items) if splits == 1 else step.num_decodes
        attend_kernel[(count, self._num_kv_heads, splits)](
            query,
            self._keys[layer],
            self._values[layer],
            out,
            self._partial,
            self._maxima,
            self._sums,
            given,
            step.tables,
            step.context_lens,
            step.query_starts,
            items,
            options.scaling,
            options.softcap or 0.0,
            options.sliding_window or ENDLESS,
            step.tables.stride(0),
            *(query.stride(2), query.stride(1), query.stride(3)),
            *(out.stride(1), out.stride(2)),
            *self._strides,
            **self._shape,
            GROUP=self._num_heads // self._num_kv_heads,
            BLOCK_SIZE=self._block_size,
            BLOCK_M=tiles.block_m,
            BLOCK_Q=tiles.block_q,
            TILE=tiles.tile,
            SPLITS=splits,
            CAPPED=options.softcap is not None,
            SINKS=sinks is not None,
            PRECISION=self._precision,
            WIDEN=self._widen,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        if splits > 1:
            combine_kernel[(step.num_decodes, self._num_heads)](
                out,
                self._partial,
                self._maxima,
                self._sums,
                given,
                step.query_starts,
                *(out.stride(1), out.stride(2)),
                **self._shape,
                SPLITS=splits,
                SINKS=sinks is not None,
            )


def _device(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and shared memory of a program."""
    if device.type != "cuda":
        return INTERPRETED
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", 99 << 10)
    return found.multi_processor_count, shared
