"""Attention over the KV pool: one call stores a step's K and V of a layer and attends.

Scores, weights and sums are float32. Sums over keys are corrected by the running maximum,
as in flash attention (Dao et al., 2022).
"""

from __future__ import annotations

from numba import types

from instance.model.kernels.lanes import (
    pointer,
    pointer_to,
    take_next,
)
from instance.model.kernels.launch import compiled
from instance.model.kernels.one_query import one_query
from instance.model.kernels.paged import ITEM_WIDTH, A, I
from instance.model.kernels.several_queries import several_queries


@compiled
def _attend_heads(a, dim, query):
    pool = pointer_to(a[A.pool], query)
    key, value = pointer_to(a[A.key], query), pointer_to(a[A.value], query)
    out = pointer_to(a[A.out], query)
    counter = pointer(a[A.counter], types.int64)
    taken = take_next(counter)
    while taken < a[A.num_items]:
        # Taken early, so that its memory can be fetched.
        then = take_next(counter)
        item = pointer(a[A.items] + taken * (8 * ITEM_WIDTH), types.int64)
        following = pointer(
            a[A.items] + min(then, a[A.num_items] - 1) * (8 * ITEM_WIDTH), types.int64
        )
        if item[I.last] - item[I.first] == 1:
            one_query(a, dim, item, following, pool, query, key, value, out)
        else:
            several_queries(a, dim, item, pool, query, key, value, out)
        taken = then


@compiled
def attend(a, query):
    # The common size is compiled as a constant: its loops have no ends to take care of.
    if a[A.head_dim] == 64:
        _attend_heads(a, 64, query)
    else:
        _attend_heads(a, a[A.head_dim], query)
