"""What is chosen before a step runs on a GPU: buckets of graphs, tiles, splits, blocks."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

MIN_TILE = 16
"""Least side of a matrix product on tensor cores."""
SMALL_BUCKETS = (1, 2, 4)
BUCKET_STEP = 8
COARSE_FROM = 64
COARSE_STEP = 16
MAX_SPLITS = 32
GRAPH_BYTES = 8 << 20
"""What a captured graph takes besides its logits and the memory that all share, generously."""
LIBRARY_BYTES = 256 << 20
"""What libraries take after the measurement."""
LOGIT_BYTES = 4


def graph_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes of which a graph is captured, rising; the last one holds every batch.

    Steps of 8 and, from 64 on, of 16 keep what is computed for nothing below an eighth and the
    number of graphs below thirty for 256 sequences.

    Raises:
        ValueError: if there is no batch at all.
    """
    if max_num_seqs < 1:
        raise ValueError("there must be room for one sequence")
    fine = range(BUCKET_STEP, min(max_num_seqs, COARSE_FROM), BUCKET_STEP)
    coarse = range(COARSE_FROM, max_num_seqs, COARSE_STEP)
    found = [size for size in (*SMALL_BUCKETS, *fine, *coarse) if size < max_num_seqs]
    return (*found, max_num_seqs)


def bucket_for(rows: int, buckets: Sequence[int]) -> int | None:
    """The least of the rising ``buckets`` that holds ``rows``; None if none does."""
    at = bisect.bisect_left(buckets, rows)
    return buckets[at] if at < len(buckets) else None


def graph_bytes(buckets: Sequence[int], vocab_size: int) -> int:
    """Memory to keep free for graphs of these sizes, each with logits of its own, and for
    what libraries take at their first call."""
    return LIBRARY_BYTES + sum(buckets) * vocab_size * LOGIT_BYTES + len(buckets) * GRAPH_BYTES


def num_splits(num_kv_heads: int, multiprocessors: int) -> int:
    """Parts into which the KV of a decode row is split, a power of two.

    A single row must keep the whole GPU busy: its programs are KV heads times splits. The
    number does not depend on the batch, so that neither do the sums.

    Raises:
        ValueError: unless both are positive.
    """
    if num_kv_heads < 1 or multiprocessors < 1:
        raise ValueError("there must be a KV head and a multiprocessor")
    wanted = multiprocessors / num_kv_heads
    splits = 1
    # The nearest power of two, by ratio.
    while splits < MAX_SPLITS and splits * 2**0.5 < wanted:
        splits *= 2
    return max(2, splits)


@dataclass(frozen=True, slots=True)
class Tiles:
    """Shapes of a program of the attention kernel.

    Attributes:
        block_m: Rows of the score tile: query positions times the heads of a group.
        block_q: Query positions among them.
        tile: KV positions at a time.
        warps: Warps of a program.
        stages: Tiles in flight.
    """

    block_m: int
    block_q: int
    tile: int
    warps: int
    stages: int


def attention_tiles(
    group: int, head_dim: int, itemsize: int, shared_bytes: int, decode: bool
) -> Tiles:
    """Tiles of a kernel that fit a multiprocessor's shared memory.

    Args:
        group: Query heads per KV head.
        head_dim: Of a head.
        itemsize: Bytes of an element of Q, K and V.
        shared_bytes: Shared memory that a program can have.
        decode: One query position per row, against chunks of a prompt.
    """
    width = power_of_two(max(head_dim, MIN_TILE))
    least = power_of_two(max(group, MIN_TILE))
    block_m = least if decode else max(least, 128 if width <= 128 and itemsize <= 2 else 64)
    tile, stages = 64, 3
    while tile * stages > MIN_TILE and _shared(block_m, tile, width, stages, itemsize) > (
        shared_bytes
    ):
        if stages > 1:
            stages -= 1
        elif tile > MIN_TILE:
            tile //= 2
        else:
            break
    warps = 4 if block_m < 128 else 8
    return Tiles(block_m, 1 if decode else block_m // group, tile, warps, stages)


def _shared(block_m: int, tile: int, width: int, stages: int, itemsize: int) -> int:
    """Shared memory of a program: the queries, and K and V of the tiles in flight."""
    return (block_m * width + 2 * stages * tile * width + block_m * tile) * itemsize


def power_of_two(count: int) -> int:
    """The least power of two that is at least ``count``."""
    return 1 << max(0, count - 1).bit_length()


def prefill_items(query_starts: Ints, num_decodes: int, block_q: int) -> Ints:
    """What each program of the prefill kernel does: [items, 2] of (row, first query in it).

    The last parts of a row come first: they see the most KV and take the longest.

    Args:
        query_starts: [R + 1] as in ``StepBatch``.
        num_decodes: Leading rows that are not prefill.
        block_q: Query positions of a program.
    """
    counts = np.diff(query_starts)[num_decodes:]
    parts = -(-counts // block_q)
    rows = np.repeat(np.arange(len(counts)), parts)
    part = np.arange(len(rows)) - np.repeat(np.cumsum(parts) - parts, parts)
    items = np.stack([rows + num_decodes, part * block_q], axis=1)
    return items[np.argsort(-items[:, 1], kind="stable")].astype(np.int64)


def pool_blocks(
    total_bytes: int, utilization: float, used_bytes: int, reserve_bytes: int, block_bytes: int
) -> int:
    """KV blocks that fit a device.

    Args:
        total_bytes: Memory of the device.
        utilization: Share of it that the instance may have, in (0, 1].
        used_bytes: What is taken already, by weights and by others, and what a step takes at
            its worst.
        reserve_bytes: What graphs and libraries will take later.
        block_bytes: Of a block.

    Raises:
        ValueError: if the share makes no sense, or not even two blocks fit.
    """
    if not 0 < utilization <= 1:
        raise ValueError(f"gpu-memory-utilization must be in (0, 1], not {utilization}")
    free = int(total_bytes * utilization) - used_bytes - reserve_bytes
    blocks = max(free, 0) // block_bytes
    if blocks < 2:
        raise ValueError(
            f"no memory is left for KV: {utilization:.0%} of {total_bytes >> 20} MiB, of which "
            f"{(used_bytes + reserve_bytes) >> 20} MiB are taken, leaves {max(free, 0) >> 20} MiB, "
            f"and a block takes {block_bytes >> 10} KiB"
        )
    return blocks
