"""The compiled kernels, against references in double precision, in a pool full of NaN."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import types
from torch import Tensor

from instance.executor import StepBatch
from instance.model.attention import make_attention
from instance.model.attention_compiled import CompiledAttention
from instance.model.attention_cpu import CpuAttention
from instance.model.context import AttentionOptions
from instance.model.kernels import launch, usable
from instance.model.kernels.lanes import exp, load, pointer, store, store_totals, tanh, total
from instance.model.parts import RmsNorm, Rotary
from instance.request import Row, StepPlan
from tests.integration.paged import Paged, row

SHAPES = [(6, 2, 32, 4), (4, 4, 16, 16), (9, 3, 64, 16), (20, 1, 16, 3), (2, 1, 80, 5)]
"""Heads, KV heads, size of a head, block size."""
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def paged(
    shape: tuple[int, int, int, int] = SHAPES[0],
    dtype: torch.dtype = torch.float32,
    num_blocks: int = 500,
) -> Paged:
    return Paged(
        num_blocks,
        make=functools.partial(CompiledAttention, num_heads=shape[0]),
        dtype=dtype,
        shape=shape,
    )


def _functions(a):  # type: ignore[no-untyped-def]
    """exp, tanh, bfloat16 and sums of 64 floats."""
    x = pointer(a[1], types.float32)
    y = pointer(a[2], types.float32)
    for i in range(0, 64, 16):
        store(y, i, exp(load(x, i)))
        store(y, 64 + i, tanh(load(x, i)))
        store(pointer(a[3], types.uint16), i, load(x, i))
        y[128 + i // 16] = total(load(x, i))
    store_totals(y, 132, load(x, 0), load(x, 16), load(x, 32), load(x, 48))


@pytest.fixture(scope="module")
def functions() -> launch.Kernel:
    return launch.kernel(_functions)


@settings(max_examples=40)
@given(st.lists(st.floats(-87, 87, width=32), min_size=64, max_size=64))
def test_functions_of_lanes(functions: launch.Kernel, values: list[float]) -> None:
    x = torch.tensor(values)
    y, halves = torch.zeros(136), torch.zeros(64, dtype=torch.bfloat16)
    functions((0, x.data_ptr(), y.data_ptr(), halves.data_ptr()))
    wide = x.double()
    torch.testing.assert_close(y[:64].double(), wide.exp(), rtol=3e-7, atol=0)
    torch.testing.assert_close(y[64:128].double(), wide.tanh(), rtol=0, atol=4e-7)
    assert torch.equal(halves, x.bfloat16())
    sums = wide.view(4, 16).sum(1)
    slack = float(wide.abs().sum()) * 1e-6
    torch.testing.assert_close(y[128:132].double(), sums, rtol=0, atol=slack)
    torch.testing.assert_close(y[132:].double(), sums, rtol=0, atol=slack)


def test_lanes_pass_nan_on(functions: launch.Kernel) -> None:
    x = torch.full((64,), torch.nan)
    y, halves = torch.zeros(136), torch.zeros(64, dtype=torch.bfloat16)
    functions((0, x.data_ptr(), y.data_ptr(), halves.data_ptr()))
    assert y.isnan().all()
    assert halves.isnan().all()


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 150), min_size=1, max_size=6),
    st.sampled_from([None, 1, 3, 20, 40, 500]),
    st.sampled_from([None, 1.5]),
    st.booleans(),
    st.sampled_from(SHAPES),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.data(),
)
def test_against_dense(
    lengths: list[int],
    window: int | None,
    softcap: float | None,
    sinks: bool,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    """Random chunks of random sequences ride together, in any order, to their ends."""
    known = torch.linspace(-1, 2, shape[0], dtype=torch.float64) if sinks else None
    options = AttentionOptions(0.3, window, softcap, known)
    pool = paged(shape, dtype)
    done = {pool.sequence(length): 0 for length in lengths}
    while left := [s for s in done if done[s] < len(s.tokens)]:
        rows = []
        for sequence in left:
            rest = len(sequence.tokens) - done[sequence]
            # Near the end one by one, so that there are decodes as well.
            count = 1 if rest <= 3 else data.draw(st.integers(max(1, rest // 3), rest - 2))
            rows.append(row(sequence, done[sequence], count))
            done[sequence] += count
        pool.check(rows, options, TOLERANCE[dtype])
    used = 0
    for sequence, length in done.items():
        assert torch.equal(pool.stored(sequence, length), pool.known[sequence])
        used += length
    # Nothing else was written.
    assert int((~pool.kv.isnan()).sum()) == used * pool.kv[0, :, :, 0].numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    """Not a bit: who computes an item does not matter, nor how rows are split by heads."""
    outputs: list[list[Tensor]] = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        pool = paged(SHAPES[2], dtype)
        long, short, other = (pool.sequence(length) for length in (140, 9, 70))
        found = []
        for rows in (
            [row(long, 0, 120)],
            [row(long, 120, 19), row(short, 0, 8), row(other, 0, 69)],
            [row(long, 139, 1), row(short, 8, 1), row(other, 69, 1)],
        ):
            found += pool.check(rows, AttentionOptions(0.1), TOLERANCE[dtype])
        outputs.append(found)
    for one, *others in zip(*outputs, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_strided_queries_keys_and_values() -> None:
    """They are parts of one product; what is not contiguous in a head is copied."""
    kv = torch.zeros(4, 1, 2, 4, 2, 16)
    backend = CompiledAttention(kv, 4)
    sequence = Paged().sequence(5)
    sequence.block_table = [1, 2]
    joined = torch.randn(1, 5, 8, 16).transpose(1, 2)
    query, key, value = joined[:, :4], joined[:, 4:6], joined[:, 6:]
    outputs = []
    for layout in (lambda x: x, lambda x: x.contiguous(), lambda x: x.mT.contiguous().mT):
        backend.prepare(StepBatch.build(StepPlan(0, [Row(sequence, 0, 5, True)]), 4))
        outputs.append(
            backend.attend(0, layout(query), layout(key), layout(value), AttentionOptions(0.25))
        )
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.25, enable_gqa=True
    ).transpose(1, 2)
    for output in outputs:
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


def test_a_row_of_nan_does_not_leak() -> None:
    pool = paged()
    broken, sound = pool.sequence(40), pool.sequence(50)
    pool.known[broken][:] = torch.nan
    options = AttentionOptions(0.2)
    for start, count, other in ((0, 39, 49), (39, 1, 1)):
        rows = [row(broken, start, count), row(sound, 50 - other if start else 0, other)]
        found = pool.step(rows, options)
        for index, (output, expected) in enumerate(found):
            if index % 2 == 0:
                assert output.isnan().all()
            else:
                torch.testing.assert_close(output.double(), expected, rtol=2e-5, atol=2e-5)
    # The next owner of its blocks is not affected either.
    heir = pool.sequence(30)
    heir.block_table = broken.block_table
    pool.check([row(heir, 0, 29)], options, 2e-5)
    pool.check([row(heir, 29, 1)], options, 2e-5)


def test_which_attention() -> None:
    def chosen(dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> type:
        return type(make_attention(torch.zeros(2, 1, 2, 4, kv_heads, dim, dtype=dtype), heads))

    assert chosen(torch.float32, 4, 2, 32) is CompiledAttention
    assert chosen(torch.bfloat16, 64, 1, 256) is CompiledAttention
    assert chosen(torch.float64, 4, 2, 32) is CpuAttention
    assert chosen(torch.float16, 4, 2, 32) is CpuAttention
    assert chosen(torch.float32, 4, 2, 24) is CpuAttention
    assert chosen(torch.float32, 4, 2, 272) is CpuAttention
    assert chosen(torch.float32, 65, 1, 16) is CpuAttention


def test_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(function: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(launch, "kernel", fail)
    usable.cache_clear()
    try:
        assert type(make_attention(torch.zeros(2, 1, 2, 4, 2, 32), 4)) is CpuAttention
        x = torch.randn(1, 3, 32)
        expected = torch.nn.functional.rms_norm(x, (32,), eps=1e-6)
        torch.testing.assert_close(RmsNorm(torch.ones(32), 1e-6, False)(x), expected)
    finally:
        usable.cache_clear()
    assert "no kernels can be compiled" in caplog.text


def test_items_cover_each_query_and_head_once() -> None:
    pool = paged(SHAPES[2])
    sequences = [pool.sequence(length) for length in (100, 1, 64, 33)]
    rows = [row(sequence, 0, len(sequence.tokens)) for sequence in sequences]
    for threads in (1, 8):
        torch.set_num_threads(threads)
        backend = pool.attention
        assert isinstance(backend, CompiledAttention)
        backend.prepare(StepBatch.build(StepPlan(0, rows), pool.size))
        seen = np.zeros((198, 3), dtype=int)
        for _, first, last, shift, begin, head, end in backend._items:
            seen[first:last, head:end] += 1
            assert first + shift >= begin
        assert (seen == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 16), (1, 70, 576), (1, 5, 3, 64)])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape[-1]).to(dtype)
    x = (3 * torch.randn(shape)).to(dtype)
    expected = torch.nn.functional.rms_norm(x.double(), shape[-1:], weight.double(), 1e-3)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found = RmsNorm(weight, 1e-3, False)(x)
        assert found.dtype == dtype
        slack = TOLERANCE[dtype] / 2
        torch.testing.assert_close(found.double(), expected, rtol=slack, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", [1, 100])
def test_rotary(positions: int, dtype: torch.dtype) -> None:
    """Halves have angles of their own; queries and keys are parts of one product."""
    heads, kv_heads, size = 9, 3, 64
    joined = torch.randn(1, positions, heads + kv_heads, size).to(dtype).transpose(1, 2)
    q, k = joined[:, :heads], joined[:, heads:]
    angles = torch.randn(1, positions, size, dtype=torch.float64)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def rotated(x: Tensor) -> Tensor:
        left, right = x.double().chunk(2, dim=-1)
        turned = torch.cat((-right, left), dim=-1)
        return x.double() * cos[:, None].double() + turned * sin[:, None].double()

    def never(*args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        raise AssertionError

    for threads in (1, 2):
        torch.set_num_threads(threads)
        for found, x in zip(Rotary(never)(q, k, cos, sin), (q, k), strict=True):
            assert found.dtype == dtype
            assert found.shape == x.shape
            torch.testing.assert_close(
                found.double(), rotated(x), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
            )
