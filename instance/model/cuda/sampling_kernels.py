"""A Triton kernel that draws the tokens of a step.

One program per row. What top-k and top-p keep is told by the logit of the last token kept, and
by how many tokens of just that logit are kept (those with the lowest ids); it is found by a
search over the bits of the logits, two at a time, so nothing is sorted. Then every kept token
races with its exponential variate (see ``noise`` and ``sampler``), in single precision at
first, and in double precision where that leaves more than one that can have won.
"""

from __future__ import annotations

import triton
import triton.language as tl

# As 64-bit patterns, since constants are signed.
GAMMA = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
FIRST = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
SECOND = tl.constexpr(0x94D049BB133111EB - (1 << 64))
LOWEST = tl.constexpr(-(1 << 31))
"""Below the key of every logit."""
MARGIN = tl.constexpr(1e-3)
"""How far single precision may put a token's time from its real one, in logarithms."""
GREEDY_BELOW = tl.constexpr(1e-5)


@triton.jit
def _values(row, size, start, BLOCK: tl.constexpr):
    """A block of logits, -inf beyond the vocabulary, and the ids."""
    ids = start + tl.arange(0, BLOCK)
    found = tl.load(row + ids, mask=ids < size, other=float("-inf")).to(tl.float32)
    # No negative zero: equal logits have equal keys.
    return found + 0.0, ids


@triton.jit
def _key(values):
    """Integers in the order of the logits."""
    bits = values.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _measure(
    row, size, least, lowest, highest, temperature, MASS: tl.constexpr, BLOCK: tl.constexpr
):
    """Number or weight of the tokens whose key is at least both bounds."""
    found = tl.zeros([], tl.float64)
    for start in range(0, size, BLOCK):
        values, ids = _values(row, size, start, BLOCK)
        key = _key(values)
        inside = (ids < size) & (key >= least) & (key >= lowest)
        weight = tl.full([BLOCK], 1.0, tl.float32)
        if MASS:
            weight = tl.exp((values - highest) / temperature)
        found += tl.sum(tl.where(inside, weight, 0.0), 0).to(tl.float64)
    return found


@triton.jit
def _threshold(
    row, size, lowest, target, highest, temperature, MASS: tl.constexpr, BLOCK: tl.constexpr
):
    """The greatest key such that the tokens from it on measure ``target`` at least."""
    prefix = tl.zeros([], tl.int64) + LOWEST
    step = tl.full([], 1 << 30, tl.int64)
    for _ in range(16):
        second = tl.zeros([], tl.float64)
        third = tl.zeros([], tl.float64)
        fourth = tl.zeros([], tl.float64)
        for start in range(0, size, BLOCK):
            values, ids = _values(row, size, start, BLOCK)
            key = _key(values)
            inside = (ids < size) & (key >= lowest)
            weight = tl.full([BLOCK], 1.0, tl.float32)
            if MASS:
                weight = tl.exp((values - highest) / temperature)
            weight = tl.where(inside, weight, 0.0)
            second += tl.sum(tl.where(key >= prefix + step, weight, 0.0), 0).to(tl.float64)
            third += tl.sum(tl.where(key >= prefix + 2 * step, weight, 0.0), 0).to(tl.float64)
            fourth += tl.sum(tl.where(key >= prefix + 3 * step, weight, 0.0), 0).to(tl.float64)
        taken = (second >= target).to(tl.int64) + (third >= target).to(tl.int64)
        prefix += step * (taken + (fourth >= target).to(tl.int64))
        step = step // 4
    return prefix


@triton.jit
def _hash(draw, ids):
    """The 52 highest bits of a token's counter, mixed."""
    counter = (ids.to(tl.int64) + 1).to(tl.uint64)
    bits = draw.to(tl.uint64) + counter * tl.full([], GAMMA, tl.int64).to(tl.uint64)
    bits = (bits ^ (bits >> 30)) * tl.full([], FIRST, tl.int64).to(tl.uint64)
    bits = (bits ^ (bits >> 27)) * tl.full([], SECOND, tl.int64).to(tl.uint64)
    bits = bits ^ (bits >> 31)
    return (bits >> 12).to(tl.int64)


@triton.jit
def _kept(key, ids, size, last, quota, seen):
    """Which tokens of a block take part, and how many of the last key came until then."""
    equal = ((key == last) & (ids < size)).to(tl.int64)
    rank = seen + tl.cumsum(equal, 0) - equal
    kept = (ids < size) & ((key > last) | ((equal > 0) & (rank < quota)))
    return kept, seen + tl.sum(equal, 0)


# See ``attention_kernels.ANYWHERE``.
@triton.jit(do_not_specialize_on_alignment=("temperatures", "top_ks", "top_ps", "min_ps", "draws"))
def sample_kernel(
    logits,
    tokens,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    draws,
    size,
    stride,
    BLOCK: tl.constexpr,
):
    """The token of each row of ``logits`` [rows, size], to ``tokens``.

    ``draws`` are the keys of the draws (``noise.position_key``); the rest is of
    ``SamplingParams``, in double precision. A temperature near 0 is greedy.
    """
    at = tl.program_id(0)
    row = logits + at.to(tl.int64) * stride

    highest = tl.full([], float("-inf"), tl.float32)
    token = tl.zeros([], tl.int64)
    for start in range(0, size, BLOCK):
        values, ids = _values(row, size, start, BLOCK)
        top = tl.max(values, 0)
        first = tl.min(tl.where(values == top, ids, size), 0)
        token = tl.where(top > highest, first.to(tl.int64), token)
        highest = tl.maximum(highest, top)

    exact = tl.load(temperatures + at)
    finite = (highest > float("-inf")) & (highest < float("inf"))
    if (exact >= GREEDY_BELOW) & finite:
        temperature = exact.to(tl.float32)
        top_k = tl.load(top_ks + at)
        top_p = tl.load(top_ps + at)
        min_p = tl.load(min_ps + at)
        draw = tl.load(draws + at)

        last = tl.zeros([], tl.int64) + LOWEST
        quota = tl.zeros([], tl.int64) + size
        if min_p > 0:
            last = tl.zeros([], tl.int64) + (1 << 31)
            for start in range(0, size, BLOCK):
                values, ids = _values(row, size, start, BLOCK)
                weight = tl.exp((values - highest).to(tl.float64) / exact)
                key = tl.where((ids < size) & (weight >= min_p), _key(values), 1 << 31)
                last = tl.minimum(last, tl.min(key, 0))
        if (top_k > 0) & (top_k < size):
            lowest = last
            key = _threshold(
                row, size, lowest, top_k.to(tl.float64), highest, temperature, False, BLOCK
            )
            if key >= lowest:
                above = _measure(row, size, key + 1, lowest, highest, temperature, False, BLOCK)
                last = key
                quota = top_k - above.to(tl.int64)
        if top_p < 1:
            more = _measure(row, size, last + 1, last, highest, temperature, True, BLOCK)
            equal = _measure(row, size, last, last, highest, temperature, False, BLOCK)
            equal -= _measure(row, size, last + 1, last, highest, temperature, False, BLOCK)
            equal = tl.minimum(equal, quota.to(tl.float64))
            # The weight of a token of the last key.
            bits = last.to(tl.int32)
            bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
            value = bits.to(tl.float32, bitcast=True)
            value = tl.where(last > LOWEST, value, float("-inf"))
            weight = tl.exp((value - highest) / temperature).to(tl.float64)
            wanted = top_p * (more + equal * weight)
            if more >= wanted:
                key = _threshold(row, size, last + 1, wanted, highest, temperature, True, BLOCK)
                last = tl.maximum(key, last + 1)
                more = _measure(row, size, last + 1, last, highest, temperature, True, BLOCK)
                bits = last.to(tl.int32)
                bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
                value = bits.to(tl.float32, bitcast=True)
                weight = tl.exp((value - highest) / temperature).to(tl.float64)
                quota = tl.zeros([], tl.int64) + size
            left = tl.ceil((wanted - more) / tl.where(weight > 0, weight, 1.0))
            quota = tl.minimum(quota, tl.maximum(left, 1.0).to(tl.int64))

        soonest = tl.full([], float("inf"), tl.float32)
        seen = tl.zeros([], tl.int64)
        for start in range(0, size, BLOCK):
            values, ids = _values(row, size, start, BLOCK)
            kept, seen = _kept(_key(values), ids, size, last, quota, seen)
            if tl.sum(kept.to(tl.int32), 0) > 0:
                time = _roughly(_hash(draw, ids)) + (highest - values) / temperature
                soonest = tl.minimum(soonest, tl.min(tl.where(kept, time, float("inf")), 0))
        best = tl.full([], float("inf"), tl.float64)
        seen = tl.zeros([], tl.int64)
        for start in range(0, size, BLOCK):
            values, ids = _values(row, size, start, BLOCK)
            kept, seen = _kept(_key(values), ids, size, last, quota, seen)
            time = _roughly(_hash(draw, ids)) + (highest - values) / temperature
            kept = kept & (time <= soonest + MARGIN)
            if tl.sum(kept.to(tl.int32), 0) > 0:
                uniform = (_hash(draw, ids).to(tl.float64) + 0.5) * (1.0 / (1 << 52))
                scaled = tl.exp((highest - values).to(tl.float64) / exact) * -tl.log(uniform)
                scaled = tl.where(kept, scaled, float("inf"))
                lead = tl.min(scaled, 0)
                first = tl.min(tl.where(scaled == lead, ids, size), 0)
                token = tl.where(lead < best, first.to(tl.int64), token)
                best = tl.minimum(best, lead)

    tl.store(tokens + at, token)


@triton.jit
def _roughly(bits):
    """The logarithm of a token's exponential variate, in single precision."""
    # Of 1 - u, so that what is small has all its digits.
    rest = ((1 << 52) - 1 - bits).to(tl.float32) * (1.0 / (1 << 52)) + 1.1e-16
    near = rest * (1 + rest * (0.5 + rest * (0.3333333 + rest * 0.25)))
    uniform = tl.maximum((bits.to(tl.float32) + 0.5) * (1.0 / (1 << 52)), 1.1e-16)
    return tl.log(tl.where(rest < 0.02, near, -tl.log(uniform)))
