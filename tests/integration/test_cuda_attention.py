"""Attention kernels of the CUDA engine, beside a float64 reference.

On a machine without a GPU they run under Triton's interpreter (see conftest.py).
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from instance.model.context import AttentionOptions
from tests.integration.paged import Paged, dense, row

pytest.importorskip("triton")

from instance.model.cuda.attention import AttentionStep, TritonAttention
from instance.model.cuda.sizing import Tiles

TILES = (Tiles(16, 1, 16, 4, 2), Tiles(32, 8, 16, 4, 2))
"""Small, so that a few dozen positions make several tiles and parts."""


def make(kv: Tensor, heads: int = 8, splits: int = 4) -> TritonAttention:
    group = heads // kv.shape[4]
    decode, prefill = TILES
    chosen = (decode, Tiles(32, 32 // group, 16, prefill.warps, prefill.stages))
    return TritonAttention(kv, heads, 8, splits, chosen)


def paged(heads: int = 8, kv_heads: int = 2, dim: int = 16, size: int = 4, **more: object) -> Paged:
    return Paged(
        make=functools.partial(make, heads=heads),
        dtype=torch.float32,
        shape=(heads, kv_heads, dim, size),
        num_blocks=200,
        **more,  # type: ignore[arg-type]
    )


OPTIONS = {
    "plain": AttentionOptions(0.3),
    "window": AttentionOptions(0.3, sliding_window=7),
    "wide window": AttentionOptions(0.3, sliding_window=1000),
    "cap": AttentionOptions(0.9, softcap=1.5),
    "sinks": AttentionOptions(0.3, sinks=torch.linspace(-1, 2, 8)),
    "all": AttentionOptions(0.9, sliding_window=19, softcap=2.0, sinks=torch.linspace(-1, 2, 8)),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_prefill_chunks_and_decodes_in_one_step(options: AttentionOptions) -> None:
    one = paged()
    short, long, fresh = one.sequence(9), one.sequence(45), one.sequence(13)
    one.check([row(short, 0, 8), row(long, 0, 27)], options, 2e-5)
    # Decodes come first; then a chunk that goes on, and a prompt that begins.
    one.check([row(short, 8, 1), row(long, 27, 17), row(fresh, 0, 13)], options, 2e-5)
    one.check([row(long, 44, 1)], options, 2e-5)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "size"),
    [(2, 2, 16, 4), (6, 2, 24, 8), (7, 1, 8, 16), (4, 4, 40, 3)],
)
def test_groups_and_head_sizes_of_any_kind(heads: int, kv_heads: int, dim: int, size: int) -> None:
    one = paged(heads, kv_heads, dim, size)
    first, second = one.sequence(30), one.sequence(18)
    options = AttentionOptions(dim**-0.5)
    one.check([row(first, 0, 29), row(second, 0, 17)], options, 2e-5)
    one.check([row(first, 29, 1), row(second, 17, 1)], options, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    one = Paged(make=make, dtype=dtype, shape=(8, 2, 16, 4), num_blocks=60)
    sequence = one.sequence(22)
    options = AttentionOptions(0.25)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    one.check([row(sequence, 0, 21)], options, tolerance)
    one.check([row(sequence, 21, 1)], options, tolerance)


def test_a_decode_is_the_same_bits_in_every_batch() -> None:
    one = paged()
    kept = one.sequence(50)
    others = [one.sequence(length) for length in (61, 5)]
    options = AttentionOptions(0.3)
    one.step([row(kept, 0, 49)], options)
    for other in others:
        one.step([row(other, 0, len(other.tokens) - 1)], options)
    query = one.normal(1, 8, 3, 16)
    attention = one.attention

    def alone(*rows: int) -> Tensor:
        """Layer 0 of a step of decode rows, by index."""
        from instance.executor import StepBatch
        from instance.request import StepPlan

        every = [kept, *others]
        chosen = [row(every[i], len(every[i].tokens) - 1, 1) for i in rows]
        attention.prepare(StepBatch.build(StepPlan(0, chosen), one.size))
        last = [one.known[every[i]][0, :, -1:] for i in rows]
        key, value = torch.cat(last, dim=1).transpose(1, 2)[:, None]
        return attention.attend(0, query[:, :, list(rows)], key, value, options)[0]

    single = alone(0)[0]
    assert torch.equal(alone(2, 0)[1], single)
    assert torch.equal(alone(1, 2, 0)[2], single)


def test_padding_rows_read_nothing_and_write_zeros() -> None:
    one = paged()
    sequence = one.sequence(12)
    one.step([row(sequence, 0, 11)], AttentionOptions(0.3))
    assert isinstance(one.attention, TritonAttention)
    tables = torch.zeros(4, 3, dtype=torch.int32)
    tables[0] = torch.tensor(sequence.block_table, dtype=torch.int32)
    last = sequence.block_table[-1] * one.size + 3
    one.attention.use(
        AttentionStep(
            slots=torch.tensor([last, 0, 0, 0]),
            tables=tables,
            context_lens=torch.tensor([12, 0, 0, 0], dtype=torch.int32),
            query_starts=torch.arange(5, dtype=torch.int32),
            num_decodes=4,
            items=None,
        )
    )
    query = one.normal(1, 8, 4, 16)
    key, value = one.normal(2, 1, 2, 4, 16)
    for layer in range(2):
        key[0, :, 0], value[0, :, 0] = one.known[sequence][layer, :, 11]
        found = one.attention.attend(layer, query, key, value, AttentionOptions(0.3))[0]
        expected = dense(
            query[0, :, :1].double(), one.known[sequence][layer].double(), 11, AttentionOptions(0.3)
        )
        torch.testing.assert_close(found[:1].double(), expected, rtol=2e-5, atol=2e-5)
        assert not found[1:].any()
    # Their K and V went to the null block.
    assert one.kv[0, :, :, 0].isfinite().all()
    assert one.kv[0, :, :, 1:].isnan().all()


def test_pools_beyond_32_bits_and_with_strided_tails() -> None:
    # Memory that is not touched costs nothing: only the blocks in use are ever written.
    layers, size, heads, dim, padded = 2, 16, 2, 16, 24
    block = layers * 2 * size * heads * padded
    num_blocks = (2**31) // block + 8
    flat = torch.empty(num_blocks * block, dtype=torch.float16)
    whole = flat.view(num_blocks, layers, 2, size, heads, padded)
    kv = whole[..., 4 : 4 + dim]
    assert kv.stride(0) * (num_blocks - 1) > 2**31
    attention = make(kv, heads=4)
    last, count = num_blocks - 1, 20
    table = [last, last - 3]
    drawn = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 1, heads, count, dim, generator=drawn).half()
    query = torch.randn(1, 4, count, dim, generator=drawn).half()
    positions = torch.arange(count)
    slots = torch.tensor(table)[positions // size] * size + positions % size
    common = {
        "tables": torch.tensor([table], dtype=torch.int32),
        "context_lens": torch.tensor([count], dtype=torch.int32),
    }
    options = AttentionOptions(0.25)
    attention.use(
        AttentionStep(
            slots=slots,
            query_starts=torch.tensor([0, count], dtype=torch.int32),
            num_decodes=0,
            items=torch.tensor([[0, 16], [0, 0]], dtype=torch.int32),
            **common,
        )
    )
    prefill = attention.attend(1, query, key, value, options)[0]
    stored = whole[table][:, 1].transpose(0, 1).reshape(2, -1, heads, padded)[:, :count]
    assert torch.equal(stored[0, ..., 4 : 4 + dim].transpose(0, 1), key[0])
    assert torch.equal(stored[1, ..., 4 : 4 + dim].transpose(0, 1), value[0])
    both = torch.stack([key[0], value[0]]).transpose(1, 2).double()
    expected = dense(query[0].double(), both, 0, options)
    torch.testing.assert_close(prefill.double(), expected, rtol=3e-3, atol=3e-3)
    attention.use(
        AttentionStep(
            slots=slots[-1:],
            query_starts=torch.tensor([0, 1], dtype=torch.int32),
            num_decodes=1,
            items=None,
            **common,
        )
    )
    decode = attention.attend(1, query[:, :, -1:], key[:, :, -1:], value[:, :, -1:], options)[0]
    torch.testing.assert_close(decode.double(), expected[-1:], rtol=3e-3, atol=3e-3)


def test_types_without_a_kernel_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        make(torch.empty(4, 1, 2, 4, 2, 16, dtype=torch.float64))
