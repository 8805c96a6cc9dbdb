"""Blocks that leave over gRPC: what is counted, and when."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from instance.migration.transports.grpc import CopyStats, send_blocks
from protos import migration_pb2 as pb

BYTES = 24


class Pool:
    """Blocks of bytes that tell their number."""

    block_bytes = BYTES

    def read(self, block: int, count: int) -> memoryview:
        return memoryview(b"".join(bytes([one]) * BYTES for one in range(block, block + count)))


class Destination:
    """Keeps the chunks, and what was counted by the time it answered."""

    def __init__(self, stats: CopyStats, written: bool = True) -> None:
        self.chunks: list[pb.KvChunk] = []
        self.counted = (0, 0)
        self._stats = stats
        self._written = written

    async def Copy(self, chunks: AsyncIterator[pb.KvChunk], **_: Any) -> pb.CopyReply:
        self.chunks = [chunk async for chunk in chunks]
        self.counted = (self._stats.bytes, self._stats.copies)
        return pb.CopyReply(written=self._written)


async def send(destination: Destination, stats: CopyStats, blocks: list[int]) -> None:
    stub: Any = destination
    pool: Any = Pool()
    await send_blocks(
        stub, (), pool, attempt="a", stage=1, first=4, blocks=blocks, chunk_bytes=BYTES * 2 - 8,
        share=None, timeout=5.0, stats=stats,
    )  # fmt: skip


async def test_all_is_counted_before_the_destination_can_know() -> None:
    stats = CopyStats()
    destination = Destination(stats)
    await send(destination, stats, [7, 8, 9, 3])
    assert destination.counted == (4 * BYTES, 2)
    sent = b"".join(chunk.data for chunk in destination.chunks)
    assert sent == b"".join(bytes([block]) * BYTES for block in (7, 8, 9, 3))
    assert [chunk.last for chunk in destination.chunks][-1]
    assert sum(chunk.last for chunk in destination.chunks) == 1
    await send(destination, stats, [1])
    assert (stats.bytes, stats.copies) == (5 * BYTES, 3)


async def test_what_was_refused_was_sent_all_the_same() -> None:
    stats = CopyStats()
    with pytest.raises(ConnectionError):
        await send(Destination(stats, written=False), stats, [2])
    assert stats.bytes == BYTES
