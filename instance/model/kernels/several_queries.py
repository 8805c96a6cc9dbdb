"""Attention of neighbouring queries of a row, as in a prompt.

Queries, and the heads that share their K and V, lie in the lanes, so that maxima and sums
over keys need nothing across lanes.
"""

from __future__ import annotations

from numba import types

from instance.model.kernels.lanes import (
    add,
    div,
    exp,
    fma,
    larger,
    load,
    mul,
    pointer,
    scratch,
    splat,
    store,
    sub,
    tanh,
    where_below,
)
from instance.model.kernels.launch import compiled
from instance.model.kernels.paged import (
    KEY_SCORES,
    KEY_SPACE,
    KEYS,
    MAX_LANES,
    NONE,
    QUERY_SPACE,
    A,
    I,
    lay_out,
    store_new,
)


@compiled
def _multiply(x, at, row, step, y, first, depth, out, to):
    """Add the product of [8, depth] numbers and [depth, 16] to [8, 16]."""
    s0, s1 = load(out, to), load(out, to + 16)
    s2, s3 = load(out, to + 32), load(out, to + 48)
    s4, s5 = load(out, to + 64), load(out, to + 80)
    s6, s7 = load(out, to + 96), load(out, to + 112)
    for k in range(depth):
        factor = load(y, first + 16 * k)
        s0 = fma(splat(x[at]), factor, s0)
        s1 = fma(splat(x[at + row]), factor, s1)
        s2 = fma(splat(x[at + 2 * row]), factor, s2)
        s3 = fma(splat(x[at + 3 * row]), factor, s3)
        s4 = fma(splat(x[at + 4 * row]), factor, s4)
        s5 = fma(splat(x[at + 5 * row]), factor, s5)
        s6 = fma(splat(x[at + 6 * row]), factor, s6)
        s7 = fma(splat(x[at + 7 * row]), factor, s7)
        at += step
    store(out, to, s0)
    store(out, to + 16, s1)
    store(out, to + 32, s2)
    store(out, to + 48, s3)
    store(out, to + 64, s4)
    store(out, to + 80, s5)
    store(out, to + 96, s6)
    store(out, to + 112, s7)


@compiled
def _weigh(a, scores, count, start, newest, oldest, masked, most):
    """Turn [count, 16] scores of keys from ``start`` on into weights.

    Lanes see keys of positions from ``oldest`` to ``newest``.

    Returns:
        The lanes' maxima, and the sums of the weights.
    """
    cap = pointer(a[A.settings], types.float32)[1]
    none, zero = splat(types.float32(NONE)), splat(types.float32(0))
    for j in range(count):
        score = load(scores, j * 16)
        if cap > 0:
            score = mul(tanh(div(score, splat(cap))), splat(cap))
        if masked:
            at = splat(types.float32(start + j))
            score = where_below(newest, at, none, where_below(at, oldest, none, score))
        if cap > 0 or masked:
            store(scores, j * 16, score)
        most = larger(most, score)
    sums = zero
    for j in range(count):
        weight = exp(sub(load(scores, j * 16), most))
        if masked:
            at = splat(types.float32(start + j))
            weight = where_below(newest, at, zero, where_below(at, oldest, zero, weight))
        sums = add(sums, weight)
        store(scores, j * 16, weight)
    return most, sums


@compiled
def several_queries(a, dim, item, pool, query, key, value, out):
    group = a[A.num_heads] // a[A.num_kv_heads]
    settings = pointer(a[A.settings], types.float32)
    scale = splat(settings[0])
    all_sinks = pointer(a[A.sinks], types.float32)
    # [lanes / 16, head_dim, 16] each.
    queries = scratch(QUERY_SPACE, types.float32)
    sums = scratch(QUERY_SPACE, types.float32)
    keys = scratch(KEY_SPACE, types.float32)
    values = scratch(KEY_SPACE, types.float32)
    scores = scratch(KEY_SCORES, types.float32)
    maxima = scratch(MAX_LANES, types.float32)
    weights = scratch(MAX_LANES, types.float32)
    newest = scratch(MAX_LANES, types.float32)
    oldest = scratch(MAX_LANES, types.float32)
    sinks = scratch(MAX_LANES, types.float32)
    single = scratch(16, types.float32)
    first = item[I.first]
    lanes = (item[I.last] - first) * group
    padded = (lanes + 15) // 16 * 16
    position = first + item[I.shift]
    end = item[I.last] + item[I.shift]
    for lane in range(padded):
        at = position + min(lane, lanes - 1) // group
        newest[lane] = at
        oldest[lane] = max(0, at - a[A.window] + 1)
    for head in range(item[I.first_head], item[I.last_head]):
        store_new(a, dim, item, head, pool, key, value)
        for lane in range(padded):
            i, g = min(lane, lanes - 1) // group, min(lane, lanes - 1) % group
            q = (head * group + g) * a[A.query_head] + (first + i) * a[A.query_step]
            to = lane // 16 * 16 * dim + lane % 16
            for c in range(0, dim, 16):
                store(single, 0, mul(load(query, q + c), scale))
                for d in range(16):
                    queries[to + (c + d) * 16] = single[d]
            maxima[lane] = NONE
            weights[lane] = 0
            if a[A.sinks] != 0:
                sinks[lane] = all_sinks[head * group + g]
        for to in range(0, padded * dim, 16):
            store(sums, to, splat(types.float32(0)))
        for start in range(max(0, position - a[A.window] + 1), end, KEYS):
            count = min(KEYS, end - start)
            lay_out(a, dim, item, head, start, count, pool, key, value, keys, values)
            for lane in range(0, padded, 16):
                if newest[lane + 15] < start or oldest[lane] > start + count - 1:
                    continue
                for j in range(0, count, 8):
                    for row in range(j, j + 8):
                        store(scores, row * 16, splat(types.float32(0)))
                    _multiply(keys, j * dim, dim, 1, queries, lane * dim, dim, scores, j * 16)
                masked = start + count - 1 > newest[lane] or start < oldest[lane + 15]
                before = load(maxima, lane)
                most, weight = _weigh(
                    a, scores, count, start, load(newest, lane), load(oldest, lane), masked, before
                )
                kept = exp(sub(before, most))
                store(maxima, lane, most)
                store(weights, lane, fma(load(weights, lane), kept, weight))
                for to in range(lane * dim, (lane + 16) * dim, 16):
                    store(sums, to, mul(load(sums, to), kept))
                for d in range(0, dim, 8):
                    to = lane * dim + d * 16
                    _multiply(values, d, 1, dim, scores, 0, count, sums, to)
        for lane in range(0, padded, 16):
            share = load(weights, lane)
            if a[A.sinks] != 0:
                sink, before = load(sinks, lane), load(maxima, lane)
                most = larger(before, sink)
                kept = exp(sub(before, most))
                share = div(fma(share, kept, exp(sub(sink, most))), kept)
            for to in range(lane * dim, (lane + 16) * dim, 16):
                store(sums, to, div(load(sums, to), share))
        for lane in range(lanes):
            i, g = lane // group, lane % group
            o = ((first + i) * a[A.num_heads] + head * group + g) * dim
            source = lane // 16 * 16 * dim + lane % 16
            for c in range(0, dim, 16):
                for d in range(16):
                    single[d] = sums[source + (c + d) * 16]
                store(out, o + c, load(single, 0))
