"""Byte access to a KV pool in a GPU's memory."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from instance.kv.copier import BlockBytes


class DeviceKvPool(BlockBytes):
    """The bytes of a block-major KV tensor, copied to and from host memory on demand.

    Copies have a stream of their own and are waited for, so that what is read can be sent and
    what was written can be attended to by the next step. Blocks that are read are sealed by a
    step that has ended, and no launched step touches those that are written.

    Args:
        kv: [num_blocks, ...], contiguous.

    Raises:
        ValueError: if the tensor is not contiguous.
    """

    def __init__(self, kv: Tensor) -> None:
        if not kv.is_contiguous():
            raise ValueError("the KV tensor must be contiguous")
        self._bytes = kv.view(-1).view(torch.uint8)
        super().__init__(kv.shape[0], self._bytes.numel() // kv.shape[0])
        self._cuda = kv.is_cuda
        self._stream = torch.cuda.Stream(kv.device) if self._cuda else None
        self._lock = threading.Lock()

    def read(self, block: int, count: int) -> memoryview:
        """A copy of the bytes of blocks [block, block + count).

        Raises:
            IndexError: if the blocks are not all in the pool.
        """
        source = self._bytes[self.of_blocks(block, count)]
        # Pinned memory is kept by torch and given out again.
        host = torch.empty(len(source), dtype=torch.uint8, pin_memory=self._cuda)
        self._copy(host, source)
        return host.numpy().data.toreadonly()

    def write(self, block: int, offset: int, data: memoryview | bytes) -> None:
        """Write ``data`` at ``offset`` bytes from the start of ``block``; it may run on into
        the blocks that follow.

        Raises:
            IndexError: if the bytes are not all in the pool.
        """
        source = memoryview(data).cast("B")
        span = self.within(block, offset, len(source))
        if not len(source):
            return
        host = torch.empty(len(source), dtype=torch.uint8, pin_memory=self._cuda)
        host.numpy().data[:] = source
        self._copy(self._bytes[span], host)

    def _copy(self, target: Tensor, source: Tensor) -> None:
        if self._stream is None:
            target.copy_(source)
            return
        with self._lock, torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            self._stream.synchronize()
