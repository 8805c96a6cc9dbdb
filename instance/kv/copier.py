"""Byte access to a KV pool that is one tensor, and copies between it and host memory."""

from __future__ import annotations

import logging
import mmap
import queue
import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from instance.executor import CopyDone, CopyRun, KvPool

logger = logging.getLogger(__name__)


class BlockBytes:
    """Where blocks lie among the bytes of a pool.

    Args:
        num_blocks: Blocks of the pool.
        block_bytes: Bytes of each.
    """

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes

    def of_blocks(self, block: int, count: int) -> slice:
        """The bytes of blocks [block, block + count).

        Raises:
            IndexError: if the blocks are not all in the pool.
        """
        if block < 0 or count < 0 or block + count > self.num_blocks:
            raise IndexError(f"blocks [{block}, {block + count}) of {self.num_blocks}")
        first = block * self.block_bytes
        return slice(first, first + count * self.block_bytes)

    def within(self, block: int, offset: int, size: int) -> slice:
        """``size`` bytes from ``offset`` bytes after the start of ``block``.

        Raises:
            IndexError: if they are not all in the pool.
        """
        first = block * self.block_bytes + offset
        total = self.num_blocks * self.block_bytes
        if block < 0 or offset < 0 or first + size > total:
            raise IndexError(f"bytes [{first}, {first + size}) of {total}")
        return slice(first, first + size)


class TensorKvPool(BlockBytes):
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
        # A view as bytes: numpy has no bfloat16.
        data = kv.view(-1).view(torch.uint8).numpy().data
        self._bytes: memoryview = data
        super().__init__(kv.shape[0], len(self._bytes) // kv.shape[0])
        self._written = written

    def read(self, block: int, count: int) -> memoryview:
        """The bytes of blocks [block, block + count): a live, read-only view.

        Raises:
            IndexError: if the blocks are not all in the pool.
        """
        return self._bytes[self.of_blocks(block, count)].toreadonly()

    def write(self, block: int, offset: int, data: memoryview | bytes) -> None:
        """Write ``data`` at ``offset`` bytes from the start of ``block``; it may run on into
        the blocks that follow.

        Raises:
            IndexError: if the bytes are not all in the pool.
        """
        source = memoryview(data).cast("B")
        span = self.within(block, offset, len(source))
        self._bytes[span] = source
        if self._written is not None and len(source) > 0:
            first_block = span.start // self.block_bytes
            self._written(first_block, (span.stop - 1) // self.block_bytes - first_block + 1)


class TensorCopier:
    """Copies runs of blocks between a KV tensor and a host tensor, both in main memory.

    Each direction has a thread of its own; a copy of a run is one call into torch, which lets
    go of the interpreter while it copies. The host tensor's memory is taken as it is first
    written.

    Args:
        kv: [num_blocks, ...], contiguous, on the CPU.
        num_host_blocks: Blocks of the host pool, a null block included.
        written: Told (first block, block count) after each run that was copied back, on the
            thread that copied it.

    Raises:
        ValueError: if the tensor is not contiguous host memory.
    """

    def __init__(
        self, kv: Tensor, num_host_blocks: int, written: Callable[[int, int], None] | None = None
    ) -> None:
        self._kv = kv
        self._copies = torch.empty((num_host_blocks, *kv.shape[1:]), dtype=kv.dtype)
        self._written = written
        self.num_host_blocks = num_host_blocks
        self.host: KvPool | None = TensorKvPool(self._copies)
        self.block_bytes: int = self.host.block_bytes
        self._out = _Lane("kv-out")
        self._in = _Lane("kv-in")

    def copy_out(self, runs: Sequence[CopyRun], done: CopyDone) -> None:
        """Copy blocks to the host pool; see ``Copier``."""
        pieces = _pieces(runs, self._kv, self._copies)
        self._out.submit(lambda: self._copy([(host, kv) for kv, host in pieces]), done)

    def copy_in(self, runs: Sequence[CopyRun], done: CopyDone) -> None:
        """Copy blocks back from the host pool; see ``Copier``."""
        pieces = _pieces(runs, self._kv, self._copies)

        written = self._written

        def work() -> float:
            seconds = self._copy(pieces)
            if written is not None:
                for run in runs:
                    written(run.device, run.count)
            return seconds

        self._in.submit(work, done)

    def close(self) -> None:
        """Wait for the copies that run; those behind them are abandoned."""
        self._out.close()
        self._in.close()

    @staticmethod
    def _copy(pieces: list[tuple[Tensor, Tensor]]) -> float:
        began = time.perf_counter()
        for target, source in pieces:
            target.copy_(source)
        return time.perf_counter() - began


class CudaCopier:
    """Copies runs of blocks between a KV tensor on a GPU and pinned host memory.

    Each direction has a stream, so copies overlap with compute and with each other. A job
    begins after all that was launched on the compute stream before its issue, and is told
    as done when the device says so: nothing launched from then on needs to wait for it.

    Args:
        kv: [num_blocks, ...], contiguous, on a CUDA device.
        num_host_blocks: Blocks of the host pool, a null block included.
        compute: The stream on which steps run; the device's default one where None.

    Raises:
        ValueError: if the tensor is not contiguous CUDA memory.
        RuntimeError: if the host memory cannot be pinned.
    """

    def __init__(
        self, kv: Tensor, num_host_blocks: int, compute: torch.cuda.Stream | None = None
    ) -> None:
        if kv.device.type != "cuda" or not kv.is_contiguous():
            raise ValueError("the KV tensor must be contiguous and on a CUDA device")
        self._kv = kv
        self._memory = PinnedMemory(num_host_blocks * kv[0].numel() * kv.element_size())
        self._copies = self._memory.tensor.view(kv.dtype).view(num_host_blocks, *kv.shape[1:])
        self._compute = compute or torch.cuda.default_stream(kv.device)
        self._out_stream = torch.cuda.Stream(kv.device)
        self._in_stream = torch.cuda.Stream(kv.device)
        self.num_host_blocks = num_host_blocks
        self.host: KvPool | None = TensorKvPool(self._copies)
        self.block_bytes: int = self.host.block_bytes
        self._out = _Lane("kv-out")
        self._in = _Lane("kv-in")

    def copy_out(self, runs: Sequence[CopyRun], done: CopyDone) -> None:
        """Copy blocks to the host pool; see ``Copier``."""
        pieces = _pieces(runs, self._kv, self._copies)
        turned = [(host, kv) for kv, host in pieces]
        self._issue(turned, self._out_stream, self._out, done)

    def copy_in(self, runs: Sequence[CopyRun], done: CopyDone) -> None:
        """Copy blocks back from the host pool; see ``Copier``."""
        self._issue(_pieces(runs, self._kv, self._copies), self._in_stream, self._in, done)

    def close(self) -> None:
        """Wait for the copies under way and give the host memory back."""
        self._out_stream.synchronize()
        self._in_stream.synchronize()
        self._out.close()
        self._in.close()
        self._memory.close()

    def _issue(
        self,
        pieces: list[tuple[Tensor, Tensor]],
        stream: torch.cuda.Stream,
        lane: _Lane,
        done: CopyDone,
    ) -> None:
        began = torch.cuda.Event(enable_timing=True)
        ended = torch.cuda.Event(enable_timing=True, blocking=True)
        with torch.cuda.device(self._kv.device), torch.cuda.stream(stream):
            stream.wait_stream(self._compute)
            began.record(stream)
            for target, source in pieces:
                target.copy_(source, non_blocking=True)
            ended.record(stream)

        def wait() -> float:
            ended.synchronize()
            return float(began.elapsed_time(ended)) / 1000

        lane.submit(wait, done)


class PinnedMemory:
    """Page-locked host memory of just the size asked for.

    ``torch.Tensor.pin_memory`` takes the next power of two, which may double a large pool.

    Args:
        num_bytes: Its size.

    Attributes:
        tensor: The bytes.

    Raises:
        RuntimeError: if the memory cannot be pinned.
    """

    def __init__(self, num_bytes: int) -> None:
        # Anonymous memory begins on a page, which registration needs.
        self._pages = mmap.mmap(-1, max(num_bytes, 1))
        self.tensor = torch.frombuffer(self._pages, dtype=torch.uint8, count=num_bytes)
        self._address = self.tensor.data_ptr()
        result = torch.cuda.cudart().cudaHostRegister(self._address, num_bytes, 0)
        if int(result) != 0 or not self.tensor.is_pinned():
            raise RuntimeError(f"{num_bytes} bytes of host memory cannot be pinned: {result}")

    def close(self) -> None:
        """Unpin; the bytes stay readable while somebody holds them."""
        torch.cuda.cudart().cudaHostUnregister(self._address)


class _Lane:
    """A thread that does one piece of work after the other."""

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[tuple[Callable[[], float], CopyDone] | None] = (
            queue.SimpleQueue()
        )
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], float], done: CopyDone) -> None:
        """Do ``work`` after what was submitted before, and tell ``done`` its result."""
        if self._closed:
            raise RuntimeError("the copier is closed")
        self._work.put((work, done))

    def close(self) -> None:
        self._closed = True
        self._work.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        # Holds for the calling thread only.
        torch.set_num_threads(1)
        while (item := self._work.get()) is not None and not self._closed:
            work, done = item
            result: float | BaseException
            try:
                result = work()
            except BaseException as error:
                logger.exception("a copy of KV blocks failed")
                result = error
            try:
                done(result)
            except Exception:
                logger.exception("the callback of a copy failed")


def _pieces(runs: Sequence[CopyRun], kv: Tensor, host: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Views of the runs on both sides. Raises IndexError if one is not in its pool."""
    for run in runs:
        ends = run.device + run.count, run.host + run.count
        if min(run.device, run.host) < 0 or ends[0] > len(kv) or ends[1] > len(host):
            raise IndexError(f"{run} of {len(kv)} blocks and {len(host)} on the host")
    return [
        (kv[run.device : run.device + run.count], host[run.host : run.host + run.count])
        for run in runs
    ]
