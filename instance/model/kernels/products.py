"""Products with packed weights, and what ends them, for the CPU.

A weight lies in panels of 48 outputs: for each word of 32 bits of the input, one float32 or
two bfloat16, the words of 48 outputs side by side. A tile of up to 8 rows times a panel is
summed in registers, as in Goto and van de Geijn (2008). A row's result does not depend on
the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

from instance.model.kernels.lanes import (
    FLOATS,
    WIDTH,
    WORDS,
    add,
    div,
    exp,
    fma,
    intrinsic,
    load,
    mul,
    pointer,
    pointer_to,
    scratch,
    splat,
    splat_ir,
    store,
    sub,
    take_next,
    tanh,
    where_below,
)
from instance.model.kernels.launch import compiled

VECTORS = 3
PANEL = VECTORS * WIDTH
"""Outputs side by side."""
ROWS = 8
"""Rows of a tile at most; with the panel's vectors they fill the registers."""
STRETCH = 128
"""Rows that are multiplied with one panel after another, so that they stay near."""
TILE = ROWS * PANEL
SILU, GELU = 1, 2
"""Activations of a gated product."""


class Product(NamedTuple):
    """The arguments of a product: addresses in bytes.

    Attributes:
        counter: Address of an int64 0.
        rows: Of x and out, side by side.
        depth: Words in a row of x.
        columns: Of out; a multiple of 16.
        x: Address of [rows, depth] words.
        weight: Address of [columns / 48, depth, 48] words; if gated of as many pairs of those,
            the gate's and the other's.
        bias: Address of [columns] float32, or 0.
        activation: SILU or GELU of the gate's product times the other, or 0 for one product.
        other: Address of [rows, columns] to be added, or 0; may be that of out.
        out: Address of [rows, columns].
    """

    counter: int
    rows: int
    depth: int
    columns: int
    x: int
    weight: int
    bias: int
    activation: int
    other: int
    out: int


P = Product(*range(len(Product._fields)))


def _tile(rows: int) -> Any:
    """What multiplies so many rows with a panel."""

    @intrinsic
    def multiply(
        context: Any, x: Any, step: Any, weight: Any, ahead: Any, depth: Any, out: Any, like: Any
    ) -> Any:
        """Write [rows, 48] sums; a word of each row at ``x`` and ``step`` bytes apart meets 48
        at ``weight``. Memory from ``ahead`` on is fetched in between, a third of a panel."""
        pairs = like.dtype == types.uint16

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            x, step, weight, ahead, depth, out, _ = args
            word, size = ir.IntType(32), ir.IntType(64)
            byte = ir.IntType(8).as_pointer()
            xs = [
                builder.inttoptr(builder.add(x, builder.mul(step, size(r))), word.as_pointer())
                for r in range(rows)
            ]
            panel = builder.inttoptr(weight, WORDS.as_pointer())
            coming = builder.inttoptr(ahead, byte)
            kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
            fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            if pairs:
                kind = ir.FunctionType(FLOATS, [FLOATS, WORDS, WORDS])
                name = "llvm.x86.avx512bf16.dpbf16ps.512"
            else:
                kind = ir.FunctionType(FLOATS, [FLOATS, FLOATS, FLOATS])
                name = f"llvm.fmuladd.v{WIDTH}f32"
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            before = builder.block
            body, after = builder.append_basic_block(), builder.append_basic_block()
            builder.branch(body)
            builder.position_at_end(body)
            i = builder.phi(size)
            i.add_incoming(size(0), before)
            sums = [builder.phi(FLOATS) for _ in range(rows * VECTORS)]
            for one in sums:
                one.add_incoming(ir.Constant(FLOATS, [0.0] * WIDTH), before)
            # To be read, into the second cache, as data.
            line = builder.gep(coming, [builder.mul(i, size(64))])
            builder.call(fetch, [line, word(0), word(2), word(1)])
            first = builder.mul(i, size(VECTORS))
            weights = [
                builder.load(builder.gep(panel, [builder.add(first, size(v))]), align=64)
                for v in range(VECTORS)
            ]
            added = []
            for r in range(rows):
                factor = splat_ir(builder, builder.load(builder.gep(xs[r], [i]), align=4), WORDS)
                for v in range(VECTORS):
                    total = sums[r * VECTORS + v]
                    if pairs:
                        added.append(builder.call(function, [total, weights[v], factor]))
                    else:
                        values = [builder.bitcast(one, FLOATS) for one in (weights[v], factor)]
                        added.append(builder.call(function, [*values, total]))
            following = builder.add(i, size(1))
            i.add_incoming(following, body)
            for one, total in zip(sums, added, strict=True):
                one.add_incoming(total, body)
            builder.cbranch(builder.icmp_signed("<", following, depth), body, after)
            builder.position_at_end(after)
            for index, total in enumerate(added):
                at = builder.bitcast(builder.gep(out, [size(WIDTH * index)]), FLOATS.as_pointer())
                builder.store(total, at, align=64)
            return context.get_dummy_value()

        whole = types.int64
        return types.none(whole, whole, whole, whole, whole, out, like), generate

    return multiply


_tile_of_8, _tile_of_4, _tile_of_2, _tile_of_1 = _tile(8), _tile(4), _tile(2), _tile(1)


@compiled
def _multiply(rows, x, step, weight, ahead, depth, out, like):
    if rows == 8:
        _tile_of_8(x, step, weight, ahead, depth, out, like)
    elif rows == 4:
        _tile_of_4(x, step, weight, ahead, depth, out, like)
    elif rows == 2:
        _tile_of_2(x, step, weight, ahead, depth, out, like)
    else:
        _tile_of_1(x, step, weight, ahead, depth, out, like)


@compiled
def _sigmoid(x):
    # More than exp takes would change nothing.
    x = sub(splat(types.float32(0)), x)
    most, one = splat(types.float32(87)), splat(types.float32(1))
    return div(one, add(one, exp(where_below(most, x, most, x))))


@compiled
def _activated(kind, x):
    if kind == SILU:
        return mul(x, _sigmoid(x))
    inner = mul(
        x, fma(mul(x, x), splat(types.float32(0.035677408)), splat(types.float32(0.7978846)))
    )
    half = mul(x, splat(types.float32(0.5)))
    return fma(half, tanh(inner), half)


@compiled
def _finish(a, sums, gated, row, rows, column, out):
    """Write a tile, after what the product ends with."""
    bias = pointer(a[P.bias], types.float32)
    other = pointer_to(a[P.other], out)
    for r in range(rows):
        at = (row + r) * a[P.columns] + column
        for c in range(0, min(PANEL, a[P.columns] - column), 16):
            value = load(sums, r * PANEL + c)
            if a[P.bias] != 0:
                value = add(value, load(bias, column + c))
            if a[P.activation] != 0:
                value = mul(_activated(a[P.activation], value), load(gated, r * PANEL + c))
            if a[P.other] != 0:
                value = add(value, load(other, at + c))
            store(out, at + c, value)


@compiled
def _product(a, out):
    """Take pieces of a product; ``out`` is its output."""
    counter = pointer(a[P.counter], types.int64)
    panels = (a[P.columns] + PANEL - 1) // PANEL
    each = 1 if a[P.activation] == 0 else 2
    step, size = a[P.depth] * 4, a[P.depth] * (4 * PANEL)
    third = a[P.depth] * 64
    items = panels * ((a[P.rows] + STRETCH - 1) // STRETCH)
    sums = scratch(TILE, types.float32)
    gated = scratch(TILE, types.float32)
    taken = take_next(counter)
    while taken < items:
        then = take_next(counter)
        panel = taken % panels
        row = taken // panels * STRETCH
        end = min(row + STRETCH, a[P.rows])
        weight = a[P.weight] + panel * (each * size)
        # The panels that come next are fetched bit by bit.
        ahead = a[P.weight] + (min(then, items - 1) % panels) * (each * size)
        last = ahead + each * size - third
        while row < end:
            rows = ROWS
            while rows > end - row:
                rows //= 2
            x = a[P.x] + row * step
            _multiply(rows, x, step, weight, ahead, a[P.depth], sums, out)
            ahead = min(ahead + third, last)
            if each == 2:
                _multiply(rows, x, step, weight + size, ahead, a[P.depth], gated, out)
                ahead = min(ahead + third, last)
            _finish(a, sums, gated, row, rows, panel * PANEL, out)
            row += rows
        taken = then


def _product_bfloat16(a):
    _product(a, pointer(a[P.out], types.uint16))


def _product_float32(a):
    _product(a, pointer(a[P.out], types.float32))


PRODUCT: dict[torch.dtype, Callable[..., None]] = {
    torch.bfloat16: _product_bfloat16,
    torch.float32: _product_float32,
}
