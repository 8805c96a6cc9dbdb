"""Byte access to a KV pool that is one tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class TensorKvPool:
    """The bytes of a block-major KV tensor in host memory, without copies.

    Args:
        kv: [num_blocks, ...], contiguous, on the CPU, of any dtype.
        written: Told (first block, block count) after each write.

    Raises:
        ValueError: if the tensor is not contiguous host memory.
    """

    def __init__(self, kv: Tensor, written: Callable[[int, int], None] | None = None) -> None:
        if kv.device.type != "cpu" or not kv.is_contiguous():
            raise ValueError("the KV tensor must be contiguous and on the CPU")
        self.num_blocks = kv.shape[0]
        # A view as bytes: numpy has no bfloat16.
        data = kv.view(-1).view(torch.uint8).numpy().data
        self._bytes: memoryview = data
        self.block_bytes = len(self._bytes) // self.num_blocks
        self._written = written

    def read(self, block: int, count: int) -> memoryview:
        """The bytes of blocks [block, block + count): a live, read-only view.

        Raises:
            IndexError: if the blocks are not all in the pool.
        """
        if block < 0 or count < 0 or block + count > self.num_blocks:
            raise IndexError(f"blocks [{block}, {block + count}) of {self.num_blocks}")
        first = block * self.block_bytes
        return self._bytes[first : first + count * self.block_bytes].toreadonly()

    def write(self, block: int, offset: int, data: memoryview | bytes) -> None:
        """Write ``data`` at ``offset`` bytes from the start of ``block``; it may run on into
        the blocks that follow.

        Raises:
            IndexError: if the bytes are not all in the pool.
        """
        source = memoryview(data).cast("B")
        first = block * self.block_bytes + offset
        last = first + len(source)
        if block < 0 or offset < 0 or last > len(self._bytes):
            raise IndexError(f"bytes [{first}, {last}) of {len(self._bytes)}")
        self._bytes[first:last] = source
        if self._written is not None and len(source) > 0:
            first_block = first // self.block_bytes
            self._written(first_block, (last - 1) // self.block_bytes - first_block + 1)
