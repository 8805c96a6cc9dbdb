"""KV blocks over gRPC streams: works between any two instances.

The chunks say where bytes belong in the sequence (block index and offset), never where
they lie in the sender's pool, so that both sides lay out their pools as they like.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from instance.executor import KvPool
from instance.kv.blocks import runs
from protos import migration_pb2 as pb
from protos import migration_pb2_grpc


@dataclass(slots=True)
class CopyStats:
    """What was sent, counted as it leaves."""

    bytes: int = 0
    copies: int = 0


class BandwidthShare:
    """Spaces out the copies of one instance to ``rate`` bytes per second; 0 is unlimited."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free_at = 0.0

    async def take(self, size: int) -> None:
        """Wait until ``size`` bytes may leave."""
        if not self._rate:
            return
        now = asyncio.get_running_loop().time()
        start = max(now, self._free_at)
        self._free_at = start + size / self._rate
        if start > now:
            await asyncio.sleep(start - now)


async def send_blocks(
    stub: migration_pb2_grpc.MigrationStub,
    metadata: tuple[tuple[str, str], ...],
    kv: KvPool | None,
    *,
    attempt: str,
    stage: int,
    first: int,
    blocks: Sequence[int],
    chunk_bytes: int,
    share: BandwidthShare | None,
    timeout: float,
    stats: CopyStats,
) -> None:
    """Send pool blocks ``blocks``, which are blocks ``first`` and following of the sequence.

    ``share`` paces the chunks; None sends them as fast as they go. ``stats`` counts them.

    Returns when the destination has written all of them. Raises grpc.aio.AioRpcError
    (also for a timeout), or ConnectionError if the destination gave the attempt up.
    """

    async def chunks() -> AsyncIterator[pb.KvChunk]:
        index = first
        ends = first + len(blocks)
        if kv is None:
            # KV without bytes (a modelled executor): only the fact is told.
            yield pb.KvChunk(attempt=attempt, stage=stage, block=first, last=True)
            return
        for block, count in runs(blocks):
            stats.copies += 1
            view = kv.read(block, count)
            for offset in range(0, len(view), chunk_bytes):
                data = bytes(view[offset : offset + chunk_bytes])
                if share is not None:
                    await share.take(len(data))
                stats.bytes += len(data)
                last = index + count == ends and offset + len(data) == len(view)
                yield pb.KvChunk(
                    attempt=attempt, stage=stage, block=index, offset=offset, data=data, last=last
                )
            index += count

    reply = await stub.Copy(chunks(), metadata=metadata, timeout=timeout)
    if not reply.written:
        raise ConnectionError("the destination no longer takes this attempt")


def write_chunk(kv: KvPool, chunk: pb.KvChunk, table: Sequence[int]) -> None:
    """Write a chunk into the blocks that ``table`` gives for the sequence's block indexes.

    Raises ValueError if the chunk reaches beyond the table.
    """
    size = kv.block_bytes
    index, offset = chunk.block + chunk.offset // size, chunk.offset % size
    data = memoryview(chunk.data)
    if index + -(-(offset + len(data)) // size) > len(table):
        raise ValueError(f"chunk for block {index} lies outside the reserved {len(table)} blocks")
    while data:
        count = 1
        needed = -(-(offset + len(data)) // size)
        while count < needed and table[index + count] == table[index] + count:
            count += 1
        piece = data[: count * size - offset]
        kv.write(table[index], offset, piece)
        data = data[len(piece) :]
        index, offset = index + count, 0
