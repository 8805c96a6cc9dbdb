"""Root mean square normalisation and rotary embedding, in one pass over each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from numba import types

from instance.model.kernels.lanes import (
    fma,
    load,
    mul,
    pointer,
    pointer_to,
    splat,
    store,
    sub,
    take_next,
    total,
)
from instance.model.kernels.launch import compiled

STRETCH = 8
"""Rows that a thread takes at a time."""


class Norm(NamedTuple):
    """The arguments of a norm: addresses in bytes.

    Attributes:
        counter: Address of an int64 0.
        rows, width: Of what x and out point at, side by side.
        x, out: Addresses of [rows, width].
        weight: Address of [width] float32.
        eps: Address of the float32 that is added to the mean square.
    """

    counter: int
    rows: int
    width: int
    x: int
    out: int
    weight: int
    eps: int


class Rotary(NamedTuple):
    """The arguments of an embedding: addresses in bytes, strides in elements.

    Attributes:
        counter: Address of an int64 0.
        positions, head_dim: Of all that follows.
        cos, sin: Addresses of [positions, head_dim].
        query, key: Addresses of [heads, positions, head_dim] with the strides of the first two.
        query_out, key_out: Addresses of [positions, heads, head_dim].
    """

    counter: int
    positions: int
    head_dim: int
    cos: int
    sin: int
    query: int
    query_heads: int
    query_head: int
    query_step: int
    query_out: int
    key: int
    key_heads: int
    key_head: int
    key_step: int
    key_out: int


N = Norm(*range(len(Norm._fields)))
R = Rotary(*range(len(Rotary._fields)))


@compiled
def _norm(a, x):
    width = a[N.width]
    out = pointer_to(a[N.out], x)
    weight = pointer(a[N.weight], types.float32)
    eps = pointer(a[N.eps], types.float32)[0]
    counter = pointer(a[N.counter], types.int64)
    while True:
        first = take_next(counter) * STRETCH
        if first >= a[N.rows]:
            return
        for row in range(first, min(first + STRETCH, a[N.rows])):
            at = row * width
            squares = splat(types.float32(0))
            for c in range(0, width, 16):
                value = load(x, at + c)
                squares = fma(value, value, squares)
            mean = total(squares) / types.float32(width)
            factor = splat(types.float32(1) / types.float32((mean + eps) ** types.float32(0.5)))
            for c in range(0, width, 16):
                store(out, at + c, mul(mul(load(x, at + c), factor), load(weight, c)))


@compiled
def _rotate(a, cos, sin, angle, x, at, out, to):
    """Rotate one head; the angles of its halves are given apart."""
    half = a[R.head_dim] // 2
    for c in range(0, half, 16):
        left, right = load(x, at + c), load(x, at + half + c)
        turned = mul(right, load(sin, angle + c))
        store(out, to + c, sub(mul(left, load(cos, angle + c)), turned))
        turned = mul(left, load(sin, angle + half + c))
        store(out, to + half + c, fma(right, load(cos, angle + half + c), turned))


@compiled
def _rotary(a, query):
    dim = a[R.head_dim]
    key = pointer_to(a[R.key], query)
    cos, sin = pointer_to(a[R.cos], query), pointer_to(a[R.sin], query)
    query_out, key_out = pointer_to(a[R.query_out], query), pointer_to(a[R.key_out], query)
    counter = pointer(a[R.counter], types.int64)
    while True:
        first = take_next(counter) * STRETCH
        if first >= a[R.positions]:
            return
        for i in range(first, min(first + STRETCH, a[R.positions])):
            for h in range(a[R.query_heads]):
                at = h * a[R.query_head] + i * a[R.query_step]
                to = (i * a[R.query_heads] + h) * dim
                _rotate(a, cos, sin, i * dim, query, at, query_out, to)
            for h in range(a[R.key_heads]):
                at = h * a[R.key_head] + i * a[R.key_step]
                to = (i * a[R.key_heads] + h) * dim
                _rotate(a, cos, sin, i * dim, key, at, key_out, to)


def _norm_bfloat16(a):
    _norm(a, pointer(a[N.x], types.uint16))


def _norm_float32(a):
    _norm(a, pointer(a[N.x], types.float32))


def _rotary_bfloat16(a):
    _rotary(a, pointer(a[R.query], types.uint16))


def _rotary_float32(a):
    _rotary(a, pointer(a[R.query], types.float32))


NORM: dict[torch.dtype, Callable[..., None]] = {
    torch.bfloat16: _norm_bfloat16,
    torch.float32: _norm_float32,
}


ROTARY: dict[torch.dtype, Callable[..., None]] = {
    torch.bfloat16: _rotary_bfloat16,
    torch.float32: _rotary_float32,
}
