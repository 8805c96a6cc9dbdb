"""What the attention kernel is told, and its ways to and from the KV pool."""

from __future__ import annotations

from typing import NamedTuple

from numba import types

from instance.model.kernels.lanes import (
    copy,
    load,
    pointer,
    scratch,
    store,
)
from instance.model.kernels.launch import compiled

MAX_HEAD_DIM = 256
MAX_LANES = 64
"""Queries, times the heads of one KV head, that an item holds at most; a multiple of 16."""
KEYS = 32
"""Keys whose K and V are laid out at a time for several queries; a multiple of 8."""
MANY_KEYS = 64
"""The same for a single query."""
NONE = -1e30
"""A score that weighs nothing; finite, since infinities cancel to NaN."""


class Attention(NamedTuple):
    """The arguments: addresses in bytes, strides in elements.

    Attributes:
        counter: Address of an int64 0, raised as items are taken.
        items: Address of [num_items, fields of Item].
        tables: Address of [rows, table_width] block ids.
        settings: Address of two float32: factor on scores, and their cap or 0.
        query, key, value: Addresses of [heads, positions, head_dim] with the strides of the
            first two; key and value have num_kv_heads.
        out: Address of [positions, num_heads, head_dim].
        pool: Address of the layer's K in block 0: [block_size, num_kv_heads, head_dim], V
            half_stride and the next block block_stride behind it.
        window: Keys visible to a query, itself included; a huge number for all.
        sinks: Address of [num_heads] float32, or 0.
    """

    counter: int
    num_items: int
    items: int
    tables: int
    table_width: int
    settings: int
    query: int
    query_head: int
    query_step: int
    key: int
    key_head: int
    key_step: int
    value: int
    value_head: int
    value_step: int
    out: int
    pool: int
    block_stride: int
    half_stride: int
    block_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int
    sinks: int


class Item(NamedTuple):
    """Neighbouring queries of a row, and heads.

    Attributes:
        row: Row of the tables.
        first, last: Query positions [first, last) of the step.
        shift: What makes them positions of the sequence when added.
        begin: Position of the row's first query in the sequence.
        first_head, last_head: KV heads.
    """

    row: int
    first: int
    last: int
    shift: int
    begin: int
    first_head: int
    last_head: int


A = Attention(*range(len(Attention._fields)))
I = Item(*range(len(Item._fields)))  # noqa: E741
ITEM_WIDTH = len(Item._fields)
QUERY_SPACE = MAX_LANES * MAX_HEAD_DIM
KEY_SPACE = KEYS * MAX_HEAD_DIM
KEY_SCORES = KEYS * 16


@compiled
def store_new(a, dim, item, head, pool, key, value):
    """Write the item's own K and V of a head into the pool."""
    size = a[A.block_size]
    table = pointer(a[A.tables], types.int64)
    first_block = item[I.row] * a[A.table_width]
    for i in range(item[I.first], item[I.last]):
        position = i + item[I.shift]
        block = position // size
        slot = table[first_block + block] * a[A.block_stride]
        slot += ((position - block * size) * a[A.num_kv_heads] + head) * dim
        k = head * a[A.key_head] + i * a[A.key_step]
        v = head * a[A.value_head] + i * a[A.value_step]
        for c in range(0, dim, 16):
            copy(pool, slot + c, key, k + c)
            copy(pool, slot + a[A.half_stride] + c, value, v + c)


@compiled
def find(a, dim, row, head, first, count, offsets):
    """Offsets in the pool of K of a head at positions [first, first + count) of a row."""
    size, step = a[A.block_size], a[A.num_kv_heads] * dim
    table = pointer(a[A.tables], types.int64)
    block = first // size
    within = first - block * size
    entry = row * a[A.table_width] + block
    done = 0
    while done < count:
        base = table[entry] * a[A.block_stride] + head * dim
        end = min(size, within + count - done)
        for i in range(within, end):
            offsets[done] = base + i * step
            done += 1
        entry += 1
        within = 0


@compiled
def lay_out(a, dim, item, head, first, count, pool, key, value, keys, values):
    """K and V of positions [first, first + count) as float32, [count, head_dim] each."""
    half = a[A.half_stride]
    offsets = scratch(MANY_KEYS, types.int64)
    stored = max(0, min(count, item[I.begin] - first))
    find(a, dim, item[I.row], head, first, stored, offsets)
    for j in range(stored):
        for c in range(0, dim, 16):
            store(keys, j * dim + c, load(pool, offsets[j] + c))
            store(values, j * dim + c, load(pool, offsets[j] + half + c))
    # Other threads may not have stored the rest yet.
    for j in range(stored, count):
        i = first + j - item[I.shift]
        k = head * a[A.key_head] + i * a[A.key_step]
        v = head * a[A.value_head] + i * a[A.value_step]
        for c in range(0, dim, 16):
            store(keys, j * dim + c, load(key, k + c))
            store(values, j * dim + c, load(value, v + c))
