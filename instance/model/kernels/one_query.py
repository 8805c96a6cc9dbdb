"""Attention of a single query per row, as in decoding.

The elements of a head lie in the lanes, as they do in the KV pool.
"""

from __future__ import annotations

from numba import types

from instance.model.kernels.lanes import (
    add,
    counted,
    div,
    exp,
    fma,
    highest,
    larger,
    load,
    lowest_lane,
    mul,
    pointer,
    prefetch,
    scratch,
    splat,
    store,
    store_totals,
    sub,
    tanh,
    total,
    where_below,
)
from instance.model.kernels.launch import inlined
from instance.model.kernels.paged import (
    KEY_SPACE,
    KEYS,
    MAX_LANES,
    NONE,
    QUERY_SPACE,
    A,
    I,
    find,
    lay_out,
    store_new,
)


@inlined
def _dots(x, at, y, dim, count, out):
    """Products of a vector and each of [count, dim]; a few more come out of what follows."""
    for j in range(0, count, 4):
        first = j * dim
        zero = splat(types.float32(0))
        p0, p1, p2, p3 = zero, zero, zero, zero
        for c in range(0, dim, 16):
            factor = load(x, at + c)
            p0 = fma(load(y, first + c), factor, p0)
            p1 = fma(load(y, first + dim + c), factor, p1)
            p2 = fma(load(y, first + 2 * dim + c), factor, p2)
            p3 = fma(load(y, first + 3 * dim + c), factor, p3)
        store_totals(out, j, p0, p1, p2, p3)


@inlined
def _weighted(weights, rows, first, dim, count, result):
    """Add 16 columns of [count, dim], weighted by row, to ``result``."""
    whole = count // 4 * 4
    at = first
    for j in range(0, whole, 4):
        result = fma(splat(weights[j]), load(rows, at), result)
        result = fma(splat(weights[j + 1]), load(rows, at + dim), result)
        result = fma(splat(weights[j + 2]), load(rows, at + 2 * dim), result)
        result = fma(splat(weights[j + 3]), load(rows, at + 3 * dim), result)
        at += 4 * dim
    for j in range(whole, count):
        result = fma(splat(weights[j]), load(rows, at), result)
        at += dim
    return result


@inlined
def one_query(a, item, pool, query, key, value, out):
    dim = a[A.head_dim]
    group = a[A.num_heads] // a[A.num_kv_heads]
    settings = pointer(a[A.settings], types.float32)
    scale, cap = splat(settings[0]), settings[1]
    sinks = pointer(a[A.sinks], types.float32)
    none, zero = splat(types.float32(NONE)), splat(types.float32(0))
    # [heads of the item, head_dim] each.
    queries = scratch(QUERY_SPACE, types.float32)
    sums = scratch(QUERY_SPACE, types.float32)
    keys = scratch(KEY_SPACE, types.float32)
    values = scratch(KEY_SPACE, types.float32)
    scores = scratch(KEYS, types.float32)
    offsets = scratch(KEYS, types.int64)
    maxima = scratch(MAX_LANES, types.float32)
    weights = scratch(MAX_LANES, types.float32)
    i = item[I.first]
    position = i + item[I.shift]
    for head in range(item[I.first_head], item[I.last_head]):
        store_new(a, item, head, pool, key, value)
    first, last = item[I.first_head] * group, item[I.last_head] * group
    for h in range(last - first):
        q = (first + h) * a[A.query_head] + i * a[A.query_step]
        for c in range(0, dim, 16):
            store(queries, h * dim + c, mul(load(query, q + c), scale))
            store(sums, h * dim + c, zero)
        maxima[h] = NONE
        weights[h] = 0
    for start in range(max(0, position - a[A.window] + 1), position + 1, KEYS):
        count = min(KEYS, position + 1 - start)
        limit = splat(types.float32(count))
        for h in range(last - first):
            # Heads take turns, since what lies side by side comes from memory together.
            if h % group == 0:
                head = (first + h) // group
                lay_out(a, item, head, start, count, pool, key, value, keys, values)
                ahead = min(KEYS, position + 1 - start - count)
                find(a, item[I.row], head, start + count, ahead, offsets)
                for j in range(ahead):
                    for c in range(0, dim, 32):
                        prefetch(pool, offsets[j] + c)
                        prefetch(pool, offsets[j] + a[A.half_stride] + c)
            _dots(queries, h * dim, keys, dim, count, scores)
            most = maxima[h]
            for j in range(0, count, 16):
                score = load(scores, j)
                if cap > 0:
                    score = mul(tanh(div(score, splat(cap))), splat(cap))
                lane = add(counted(), splat(types.float32(j)))
                score = where_below(lane, limit, score, none)
                store(scores, j, score)
                most = max(most, highest(score))
            added = zero
            for j in range(0, count, 16):
                lane = add(counted(), splat(types.float32(j)))
                weight = exp(sub(load(scores, j), splat(most)))
                weight = where_below(lane, limit, weight, zero)
                store(scores, j, weight)
                added = add(added, weight)
            kept = exp(splat(maxima[h] - most))
            weights[h] = weights[h] * lowest_lane(kept) + total(added)
            maxima[h] = most
            for c in range(0, dim, 16):
                result = mul(load(sums, h * dim + c), kept)
                result = _weighted(scores, values, c, dim, count, result)
                store(sums, h * dim + c, result)
    for h in range(last - first):
        share = splat(weights[h])
        if a[A.sinks] != 0:
            sink, before = splat(sinks[first + h]), splat(maxima[h])
            most = larger(before, sink)
            kept = exp(sub(before, most))
            share = div(fma(share, kept, exp(sub(sink, most))), kept)
        o = (i * a[A.num_heads] + first + h) * dim
        for c in range(0, dim, 16):
            store(out, o + c, div(load(sums, h * dim + c), share))
