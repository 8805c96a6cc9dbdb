"""Triton kernels of attention over the block-major KV pool.

One kernel attends prefill chunks and decodes. The heads that share a KV head and, in a prompt,
neighbouring query positions make the rows of a score tile (q-blocks, as in vLLM's unified
Triton attention, arXiv 2511.11581); K and V come from the pool tile by tile, with an online
softmax (FlashAttention). The KV of a decode row is split into a fixed number of parts, which a
second kernel adds up (Flash-Decoding): how a row is cut depends on nothing but its own length,
so that its result is the same in every batch.

Strides count elements. Block ids are widened before they are multiplied: a pool may have more
than 2**31 elements. A context of length 0 (padding) reads nothing and writes zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# A step's arrays lie where they fit: a kernel compiled for each way in which they are aligned
# would be compiled again and again while requests wait.
ANYWHERE = ("slots", "tables", "context_lens", "query_starts", "items")


@triton.jit(do_not_specialize_on_alignment=ANYWHERE)
def store_kernel(
    key,
    value,
    key_cache,
    value_cache,
    slots,
    key_step,
    key_head,
    key_dim,
    value_step,
    value_head,
    value_dim,
    block_stride,
    token_stride,
    head_stride,
    dim_stride,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """K and V of one position to their slot; grid (positions,)."""
    at = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + at).to(tl.int64)
    head = tl.arange(0, BLOCK_H)[:, None]
    dim = tl.arange(0, BLOCK_D)[None, :]
    inside = (head < HEADS) & (dim < DIM)
    target = (
        (slot // BLOCK_SIZE) * block_stride
        + (slot % BLOCK_SIZE) * token_stride
        + head * head_stride
        + dim * dim_stride
    )
    one = tl.load(key + at * key_step + head * key_head + dim * key_dim, mask=inside)
    tl.store(key_cache + target, one, mask=inside)
    one = tl.load(value + at * value_step + head * value_head + dim * value_dim, mask=inside)
    tl.store(value_cache + target, one, mask=inside)


@triton.jit
def _capped(score, cap):
    """cap * tanh(score / cap), without overflow."""
    return cap * (1 - 2 / (tl.exp2(score * (2 * LOG2E / cap)) + 1))


@triton.jit(do_not_specialize=("table_stride",), do_not_specialize_on_alignment=ANYWHERE)
def attend_kernel(
    query,
    key_cache,
    value_cache,
    out,
    partial,
    maxima,
    sums,
    sinks,
    tables,
    context_lens,
    query_starts,
    items,
    scale,
    cap,
    window,
    table_stride,
    query_step,
    query_head,
    query_dim,
    out_step,
    out_head,
    block_stride,
    token_stride,
    head_stride,
    dim_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Attention of a q-block over its KV, or over one part of it.

    Grid: (items, KV heads, 1) for prefill, where SPLITS is 1 and the output is written; (rows,
    KV heads, SPLITS) for decode, where unnormalised sums go to ``partial`` [rows, heads,
    SPLITS, BLOCK_D], with the maximum score ``maxima`` (base 2) and the sum of weights ``sums``
    [rows, heads, SPLITS]. WIDEN multiplies in float32, for the interpreter, which knows no
    products of bfloat16.
    """
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    if SPLITS == 1:
        row = tl.load(items + 2 * tl.program_id(0)).to(tl.int32)
        first = tl.load(items + 2 * tl.program_id(0) + 1).to(tl.int32)
    else:
        row = tl.program_id(0)
        first = 0
    begin = tl.load(query_starts + row).to(tl.int32)
    count = tl.load(query_starts + row + 1).to(tl.int32) - begin
    context = tl.load(context_lens + row).to(tl.int32)

    lane = tl.arange(0, BLOCK_M)
    in_row = first + lane // GROUP
    head = kv_head * GROUP + lane % GROUP
    live = (lane < BLOCK_Q * GROUP) & (in_row < count)
    dim = tl.arange(0, BLOCK_D)
    in_dim = dim < DIM
    position = context - count + in_row

    # KV that some row of the tile sees.
    low = tl.maximum(context - count + first - window + 1, 0)
    high = tl.minimum(context - count + first + BLOCK_Q, context)
    share = tl.cdiv(tl.maximum(high - low, 0), SPLITS * TILE) * TILE
    start = low + split * share
    stop = tl.minimum(start + share, high)

    at = (begin + in_row).to(tl.int64)
    q = tl.load(
        query + at[:, None] * query_step + head[:, None] * query_head + dim[None, :] * query_dim,
        mask=live[:, None] & in_dim[None, :],
        other=0.0,
    )
    if WIDEN:
        q = q.to(tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    table = tables + row.to(tl.int64) * table_stride
    offset = tl.arange(0, TILE)
    for tile in range(start, stop, TILE):
        n = tile + offset
        exists = n < stop
        block = tl.load(table + n // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
        source = block * block_stride + (n % BLOCK_SIZE) * token_stride + kv_head * head_stride
        k = tl.load(
            key_cache + source[None, :] + dim[:, None] * dim_stride,
            mask=in_dim[:, None] & exists[None, :],
            other=0.0,
        )
        if WIDEN:
            k = k.to(tl.float32)
        score = tl.dot(q, k, input_precision=PRECISION) * scale
        if CAPPED:
            score = _capped(score, cap)
        score = score * LOG2E
        visible = exists[None, :] & (n[None, :] <= position[:, None])
        visible = visible & (n[None, :] > position[:, None] - window)
        score = tl.where(visible, score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        # Of a row that sees nothing yet; -inf less -inf is no number.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - base[:, None])
        fade = tl.exp2(highest - base)
        total = total * fade + tl.sum(weight, 1)
        v = tl.load(
            value_cache + source[:, None] + dim[None, :] * dim_stride,
            mask=exists[:, None] & in_dim[None, :],
            other=0.0,
        )
        weight = weight.to(v.dtype)
        if WIDEN:
            weight, v = weight.to(tl.float32), v.to(tl.float32)
        mixed = tl.dot(weight, v, mixed * fade[:, None], input_precision=PRECISION)
        highest = higher

    if SPLITS == 1:
        if SINKS:
            sink = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32) * LOG2E
            higher = tl.maximum(highest, sink)
            fade = tl.exp2(highest - higher)
            total = total * fade + tl.exp2(sink - higher)
            mixed = mixed * fade[:, None]
        mixed = mixed / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(
            out + at[:, None] * out_step + head[:, None] * out_head + dim[None, :],
            mixed.to(out.dtype.element_ty),
            mask=live[:, None] & in_dim[None, :],
        )
    else:
        part = (row.to(tl.int64) * HEADS + head) * SPLITS + split
        tl.store(maxima + part, highest, mask=live)
        tl.store(sums + part, total, mask=live)
        if start < stop:
            tl.store(
                partial + part[:, None] * BLOCK_D + dim[None, :],
                mixed,
                mask=live[:, None] & in_dim[None, :],
            )


@triton.jit(do_not_specialize_on_alignment=ANYWHERE)
def combine_kernel(
    out,
    partial,
    maxima,
    sums,
    sinks,
    query_starts,
    out_step,
    out_head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    SINKS: tl.constexpr,
):
    """The parts of a decode row's head to its output; grid (rows, heads)."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    dim = tl.arange(0, BLOCK_D)
    part = (row.to(tl.int64) * HEADS + head) * SPLITS + tl.arange(0, SPLITS)
    highest = tl.load(maxima + part)
    some = highest > float("-inf")
    top = tl.max(highest, 0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.where(some, tl.exp2(highest - base), 0.0)
    total = tl.sum(weight * tl.load(sums + part), 0)
    if SINKS:
        total = total + tl.exp2(sink - base)
    mixed = tl.load(
        partial + part[:, None] * BLOCK_D + dim[None, :],
        mask=some[:, None] & (dim < DIM)[None, :],
        other=0.0,
    )
    result = tl.sum(mixed * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    at = tl.load(query_starts + row).to(tl.int64)
    tl.store(
        out + at * out_step + head * out_head + dim, result.to(out.dtype.element_ty), dim < DIM
    )
