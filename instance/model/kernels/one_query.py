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
from instance.model.kernels.launch import compiled
from instance.model.kernels.paged import (
    MANY_KEYS,
    MAX_HEAD_DIM,
    MAX_LANES,
    NONE,
    QUERY_SPACE,
    A,
    I,
    find,
    lay_out,
    store_new,
)

SPACE = MANY_KEYS * MAX_HEAD_DIM
SCORES = MANY_KEYS * MAX_LANES


@compiled
def _fetch(dim, pool, offsets, first, last, shift):
    """Have a head's K, or V ``shift`` elements behind it, at offsets [first, last) brought near."""
    for j in range(first, last):
        for c in range(0, dim, 32):
            prefetch(pool, offsets[j] + shift + c)


@compiled
def _dots(dim, x, at, y, count, out, to, pool, offsets, ahead, pace, turn):
    """Products of a vector and each of [count, head_dim]; a few more come out of what follows.

    In between, K at ``pace`` of the offsets at a time is fetched, from where ``turn`` says.
    """
    fetched = turn * pace * ((count + 3) // 4)
    for j in range(0, count, 4):
        _fetch(dim, pool, offsets, fetched, min(fetched + pace, ahead), 0)
        fetched += pace
        first = j * dim
        zero = splat(types.float32(0))
        p0, p1, p2, p3 = zero, zero, zero, zero
        for c in range(0, dim, 16):
            factor = load(x, at + c)
            p0 = fma(load(y, first + c), factor, p0)
            p1 = fma(load(y, first + dim + c), factor, p1)
            p2 = fma(load(y, first + 2 * dim + c), factor, p2)
            p3 = fma(load(y, first + 3 * dim + c), factor, p3)
        store_totals(out, to + j, p0, p1, p2, p3)


@compiled
def _weigh_four(
    dim, shift, weights, at, rows, first, count, sums, to, pool, offsets, ahead, pace, fetched
):
    """Add 64 columns of [count, head_dim], weighted by row, to ``sums``; fetches V meanwhile."""
    s0, s1, s2, s3 = load(sums, to), load(sums, to + 16), load(sums, to + 32), load(sums, to + 48)
    for j in range(0, count, 4):
        _fetch(dim, pool, offsets, fetched, min(fetched + pace, ahead), shift)
        fetched += pace
        for i in range(j, min(j + 4, count)):
            weight = splat(weights[at + i])
            s0 = fma(weight, load(rows, first), s0)
            s1 = fma(weight, load(rows, first + 16), s1)
            s2 = fma(weight, load(rows, first + 32), s2)
            s3 = fma(weight, load(rows, first + 48), s3)
            first += dim
    store(sums, to, s0)
    store(sums, to + 16, s1)
    store(sums, to + 32, s2)
    store(sums, to + 48, s3)


@compiled
def _weigh_one(weights, at, rows, first, dim, count, sums, to):
    """Add 16 columns of [count, dim], weighted by row, to ``sums``."""
    result = load(sums, to)
    for j in range(count):
        result = fma(splat(weights[at + j]), load(rows, first), result)
        first += dim
    store(sums, to, result)


@compiled
def _weigh(dim, shift, weights, at, rows, count, sums, to, pool, offsets, ahead, pace, turn):
    """Add [count, head_dim], weighted by row, to ``sums``; V is fetched as K is by ``_dots``."""
    whole = dim // 64 * 64
    fetched = turn * pace * ((count + 3) // 4)
    for c in range(0, whole, 64):
        last = ahead if c == 0 else 0
        first = to + c
        _weigh_four(
            dim, shift, weights, at, rows, c, count, sums, first, pool, offsets, last, pace, fetched
        )
    if whole == 0:
        last = min(fetched + pace * ((count + 3) // 4), ahead)
        _fetch(dim, pool, offsets, fetched, last, shift)
    for c in range(whole, dim, 16):
        _weigh_one(weights, at, rows, c, dim, count, sums, to + c)


@compiled
def _weights(scores, at, count, before, cap):
    """Turn a head's scores into weights.

    Returns:
        The largest score, or ``before`` if that is larger, and the sum of the weights.
    """
    none, zero = splat(types.float32(NONE)), splat(types.float32(0))
    limit = splat(types.float32(count))
    largest = none
    for j in range(0, count, 16):
        score = load(scores, at + j)
        if cap > 0:
            score = mul(tanh(div(score, splat(cap))), splat(cap))
        lane = add(counted(), splat(types.float32(j)))
        score = where_below(lane, limit, score, none)
        store(scores, at + j, score)
        largest = larger(largest, score)
    most = max(before, highest(largest))
    added = zero
    for j in range(0, count, 16):
        lane = add(counted(), splat(types.float32(j)))
        weight = exp(sub(load(scores, at + j), splat(most)))
        weight = where_below(lane, limit, weight, zero)
        store(scores, at + j, weight)
        added = add(added, weight)
    return most, total(added)


@compiled
def _find_ahead(a, dim, item, following, head, start, offsets):
    """Offsets of K that is needed next, of this item or else of the one that follows it.

    Returns:
        How many there are.
    """
    position = item[I.first] + item[I.shift]
    if start <= position:
        ahead = min(MANY_KEYS, position + 1 - start)
        find(a, dim, item[I.row], head, start, ahead, offsets)
        return ahead
    position = following[I.first] + following[I.shift]
    start = max(0, position - a[A.window] + 1)
    ahead = min(MANY_KEYS, position + 1 - start)
    head = min(head - item[I.first_head] + following[I.first_head], following[I.last_head] - 1)
    find(a, dim, following[I.row], head, start, ahead, offsets)
    return ahead


@compiled
def one_query(a, dim, item, following, pool, query, key, value, out):
    shift = a[A.half_stride]
    group = a[A.num_heads] // a[A.num_kv_heads]
    settings = pointer(a[A.settings], types.float32)
    scale, cap = splat(settings[0]), settings[1]
    sinks = pointer(a[A.sinks], types.float32)
    # [heads of the item, head_dim] each.
    queries = scratch(QUERY_SPACE, types.float32)
    sums = scratch(QUERY_SPACE, types.float32)
    keys = scratch(SPACE, types.float32)
    values = scratch(SPACE, types.float32)
    scores = scratch(SCORES, types.float32)
    offsets = scratch(MANY_KEYS, types.int64)
    maxima = scratch(MAX_LANES, types.float32)
    weights = scratch(MAX_LANES, types.float32)
    i = item[I.first]
    position = i + item[I.shift]
    for head in range(item[I.first_head], item[I.last_head]):
        store_new(a, dim, item, head, pool, key, value)
    first, last = item[I.first_head] * group, item[I.last_head] * group
    for h in range(last - first):
        q = (first + h) * a[A.query_head] + i * a[A.query_step]
        for c in range(0, dim, 16):
            store(queries, h * dim + c, mul(load(query, q + c), scale))
            store(sums, h * dim + c, splat(types.float32(0)))
        maxima[h] = NONE
        weights[h] = 0
    for start in range(max(0, position - a[A.window] + 1), position + 1, MANY_KEYS):
        count = min(MANY_KEYS, position + 1 - start)
        # Heads take turns, since what lies side by side comes from memory together.
        for head in range(item[I.first_head], item[I.last_head]):
            lay_out(a, dim, item, head, start, count, pool, key, value, keys, values)
            # What is laid out stays near; the next is fetched while this is computed with.
            ahead = _find_ahead(a, dim, item, following, head, start + count, offsets)
            # For every four keys that a head computes with.
            turns = (count + 3) // 4 * group
            pace = (ahead + turns - 1) // turns
            h = head * group - first
            # In three loops, so that the processor has several heads to go on with.
            for g in range(group):
                at, to = (h + g) * dim, g * MANY_KEYS
                _dots(dim, queries, at, keys, count, scores, to, pool, offsets, ahead, pace, g)
            for g in range(group):
                most, weight = _weights(scores, g * MANY_KEYS, count, maxima[h + g], cap)
                kept = exp(splat(maxima[h + g] - most))
                weights[h + g] = weights[h + g] * lowest_lane(kept) + weight
                maxima[h + g] = most
                for to in range((h + g) * dim, (h + g + 1) * dim, 16):
                    store(sums, to, mul(load(sums, to), kept))
            for g in range(group):
                at, to = g * MANY_KEYS, (h + g) * dim
                _weigh(
                    dim, shift, scores, at, values, count, sums, to, pool, offsets, ahead, pace, g
                )
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
