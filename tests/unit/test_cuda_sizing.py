"""What is chosen before a step runs on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instance.model.cuda.sizing import (
    attention_tiles,
    bucket_for,
    graph_buckets,
    graph_bytes,
    num_splits,
    pool_blocks,
    power_of_two,
    prefill_items,
)


@given(st.integers(1, 1024), st.data())
def test_every_batch_has_a_bucket_and_little_is_padded(most: int, data: st.DataObject) -> None:
    buckets = graph_buckets(most)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] == most
    rows = data.draw(st.integers(1, most))
    bucket = bucket_for(rows, buckets)
    assert bucket is not None
    assert bucket in buckets
    assert rows <= bucket < rows + (16 if rows > 64 else 8)
    assert bucket == min(one for one in buckets if one >= rows)
    assert bucket_for(most + 1, buckets) is None


def test_few_graphs_hold_a_large_batch() -> None:
    assert len(graph_buckets(256)) <= 24
    assert graph_buckets(3) == (1, 2, 3)
    with pytest.raises(ValueError, match="room for one"):
        graph_buckets(0)


@given(st.integers(1, 128), st.integers(1, 256))
def test_splits_are_a_power_of_two_near_what_fills_the_gpu(heads: int, processors: int) -> None:
    splits = num_splits(heads, processors)
    assert 2 <= splits <= 32
    assert splits == power_of_two(splits)
    if 2 < splits < 32:
        assert 0.7 <= heads * splits / processors <= 1.42


def test_an_eight_billion_model_on_a_large_gpu() -> None:
    assert num_splits(8, 132) == 16
    with pytest.raises(ValueError, match="must be"):
        num_splits(0, 132)


@given(
    st.integers(1, 64),
    st.integers(1, 256),
    st.sampled_from([2, 4]),
    st.integers(99 << 10, 227 << 10),
    st.booleans(),
)
def test_tiles_fit_and_hold_whole_groups(
    group: int, head_dim: int, itemsize: int, shared: int, decode: bool
) -> None:
    tiles = attention_tiles(group, head_dim, itemsize, shared, decode)
    width = power_of_two(max(16, head_dim))
    for side in (tiles.block_m, tiles.tile):
        assert side >= 16
        assert side == power_of_two(side)
    assert tiles.block_q * group <= tiles.block_m
    assert tiles.block_q == 1 if decode else tiles.block_q >= 1
    taken = (tiles.block_m * (width + tiles.tile) + 2 * tiles.stages * tiles.tile * width) * (
        itemsize
    )
    # The widest heads in single precision take the least there is.
    assert taken <= shared or (tiles.tile, tiles.stages) == (16, 1)


@given(st.lists(st.integers(1, 70), max_size=6), st.integers(0, 4), st.integers(1, 33))
def test_items_cover_every_prefill_query_once(
    counts: list[int], decodes: int, block_q: int
) -> None:
    starts = np.cumsum([0, *[1] * decodes, *counts])
    items = prefill_items(starts, decodes, block_q)
    covered = [
        (row, at)
        for row, first in items.tolist()
        for at in range(first, min(first + block_q, int(starts[row + 1] - starts[row])))
    ]
    expected = [(decodes + i, at) for i, count in enumerate(counts) for at in range(count)]
    assert sorted(covered) == expected
    firsts = items[:, 1].tolist()
    assert firsts == sorted(firsts, reverse=True)


@given(
    st.integers(1 << 20, 1 << 38),
    st.floats(0.01, 1.0),
    st.integers(0, 1 << 36),
    st.integers(0, 1 << 34),
    st.integers(1 << 10, 1 << 24),
)
def test_the_pool_stays_within_the_share(
    total: int, share: float, used: int, reserve: int, block: int
) -> None:
    try:
        blocks = pool_blocks(total, share, used, reserve, block)
    except ValueError:
        assert int(total * share) - used - reserve < 2 * block
    else:
        assert used + reserve + blocks * block <= total * share
        assert used + reserve + (blocks + 1) * block > int(total * share)


def test_graphs_keep_logits_of_their_own() -> None:
    # The largest alone takes 256 rows of 128,000 logits, all together nine times that.
    buckets = graph_buckets(256)
    assert graph_bytes((256,), 128_000) > 256 * 128_000 * 2
    assert 9 * 256 * 128_000 * 2 < graph_bytes(buckets, 128_000) < 3 << 30
    assert graph_bytes((), 128_000) < graph_bytes((1,), 128_000)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01])
def test_a_share_that_makes_no_sense_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="gpu-memory-utilization"):
        pool_blocks(1 << 30, share, 0, 0, 1 << 20)
