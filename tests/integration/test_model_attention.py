"""The CPU attention alone, against a dense reference, in a pool full of NaN."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instance.executor import StepBatch
from instance.model import attention_cpu
from instance.model.attention_cpu import CpuAttention
from instance.model.context import AttentionOptions
from instance.request import Request, Row, SamplingParams, Sequence, StepPlan
from tests.integration.paged import DIM, HEADS, KV_HEADS, SIZE, Paged, dense, row

PLAIN = AttentionOptions(scaling=1 / math.sqrt(DIM))
SINKS = torch.linspace(-1, 2, HEADS, dtype=torch.float64)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 120), min_size=1, max_size=8),
    st.sampled_from([None, 1, 3, 8, 30, 500]),
    st.sampled_from([None, 1.5]),
    st.booleans(),
    st.data(),
)
def test_against_dense(
    lengths: list[int], window: int | None, softcap: float | None, sinks: bool, data: st.DataObject
) -> None:
    """Random chunks of random sequences ride together, in any order, to their ends."""
    options = AttentionOptions(0.4, window, softcap, SINKS if sinks else None)
    paged = Paged()
    done = {paged.sequence(length): 0 for length in lengths}
    while left := [s for s in done if done[s] < len(s.tokens)]:
        rows = []
        for sequence in left:
            rest = len(sequence.tokens) - done[sequence]
            # Near the end one by one, so that there are decodes as well.
            count = 1 if rest <= 3 else data.draw(st.integers(max(1, rest // 3), rest - 2))
            rows.append(row(sequence, done[sequence], count))
            done[sequence] += count
        paged.check(rows, options)


@pytest.mark.parametrize("window", [None, 50])
def test_many_rows_of_very_different_lengths(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than one bucket, by length and by size; the rows keep their order outside."""
    monkeypatch.setattr(attention_cpu, "BUCKET_BYTES", 1 << 16)
    paged = Paged(num_blocks=600)
    lengths = (3, 300, 40, 500, 41, 7, 290, 150, 1, 148, 147)
    sequences = [paged.sequence(length) for length in lengths]
    options = PLAIN._replace(sliding_window=window)
    first = [row(s, 0, len(s.tokens) - 1) for s in sequences if len(s.tokens) > 1]
    paged.check(first, options)
    paged.check([row(s, len(s.tokens) - 1, 1) for s in sequences], options)


def test_reads_a_different_window_per_layer_in_one_step() -> None:
    paged = Paged()
    sequence, other = paged.sequence(40), paged.sequence(9)
    paged.check([row(sequence, 0, 39), row(other, 0, 8)], PLAIN)
    for options in (PLAIN, PLAIN._replace(sliding_window=5), PLAIN):
        paged.check([row(sequence, 39, 1), row(other, 8, 1)], options)


def test_tails_written_from_outside_do_not_leak() -> None:
    """A receiver may get a block whose tail was never written."""
    paged = Paged()
    # Near enough in length to be gathered at one width.
    long, short = paged.sequence(22), paged.sequence(11)
    paged.check([row(long, 0, 20), row(short, 0, 9)], PLAIN)
    paged.check([row(long, 20, 1), row(short, 9, 1)], PLAIN)
    last = short.block_table[2]
    spoiled = paged.kv[last].clone()
    spoiled[:, :, 2:] = torch.nan
    paged.pool.write(last, 0, spoiled.numpy().tobytes())
    paged.check([row(long, 21, 1), row(short, 10, 1)], PLAIN)


def test_a_row_of_nan_does_not_leak_into_the_next_owner_of_its_blocks() -> None:
    """KV that a step itself wrote, of a sequence that went wrong."""
    paged = Paged()
    broken = paged.sequence(12)
    paged.known[broken][:] = torch.nan
    paged.step([row(broken, 0, 11)], PLAIN)
    paged.step([row(broken, 11, 1)], PLAIN)
    long, short = paged.sequence(22), paged.sequence(11)
    short.block_table = broken.block_table
    paged.check([row(long, 0, 20), row(short, 0, 8)], PLAIN)
    paged.check([row(long, 20, 1), row(short, 8, 1)], PLAIN)


def test_workspace_is_reused() -> None:
    """Steps of a size seen before allocate no gather buffers."""
    paged = Paged()
    sequences = [paged.sequence(50), paged.sequence(44)]
    paged.check([row(s, 0, 40) for s in sequences], PLAIN)
    paged.check([row(s, 40, 1) for s in sequences], PLAIN)
    before = paged.attention._workspace.data_ptr()
    paged.check([row(s, 41, 1) for s in sequences], PLAIN)
    paged.check([row(s, 42, 2) for s in sequences], PLAIN)
    assert paged.attention._workspace.data_ptr() == before


def test_bfloat16() -> None:
    """Half precision, capped and not, stays near the exact result."""
    kv = torch.full((40, 1, 2, SIZE, KV_HEADS, DIM), torch.nan, dtype=torch.bfloat16)
    attention = CpuAttention(kv)
    random = torch.Generator().manual_seed(0)
    sequence = Sequence.start(Request("r", tuple(range(30)), SamplingParams()))
    sequence.block_table = list(range(8, 0, -1))
    plan = StepPlan(0, [Row(sequence, 0, 30, True)])
    for softcap in (None, 2.0):
        options = PLAIN._replace(softcap=softcap)
        query = torch.randn(1, HEADS, 30, DIM, generator=random).bfloat16()
        key, value = torch.randn(2, 1, KV_HEADS, 30, DIM, generator=random).bfloat16()
        attention.prepare(StepBatch.build(plan, SIZE))
        found = attention.attend(0, query, key, value, options)[0]
        assert found.dtype == torch.bfloat16
        both = torch.stack([key[0], value[0]]).transpose(1, 2).double()
        expected = dense(query[0].double(), both, 0, options)
        assert np.abs((found.double() - expected).numpy()).max() < 0.05
