"""Attention over the KV pool: one call stores a step's K and V of a layer and attends.

Scores, weights and sums are float32. Sums over keys are corrected by the running maximum,
as in flash attention (Dao et al., 2022).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from numba import types

from instance.model.kernels.lanes import (
    pointer,
    pointer_to,
    take_next,
)
from instance.model.kernels.launch import compiled
from instance.model.kernels.one_query import one_query
from instance.model.kernels.paged import ITEM_WIDTH, MAX_HEAD_DIM, MAX_LANES, A, Attention, I
from instance.model.kernels.several_queries import several_queries

__all__ = ["ATTENTION", "MAX_HEAD_DIM", "MAX_LANES", "Attention"]


@compiled
def _attend(a, query):
    pool = pointer_to(a[A.pool], query)
    key, value = pointer_to(a[A.key], query), pointer_to(a[A.value], query)
    out = pointer_to(a[A.out], query)
    counter = pointer(a[A.counter], types.int64)
    while True:
        taken = take_next(counter)
        if taken >= a[A.num_items]:
            return
        item = pointer(a[A.items] + taken * (8 * ITEM_WIDTH), types.int64)
        if item[I.last] - item[I.first] == 1:
            one_query(a, item, pool, query, key, value, out)
        else:
            several_queries(a, item, pool, query, key, value, out)


def _attend_bfloat16(a):
    _attend(a, pointer(a[A.query], types.uint16))


def _attend_float32(a):
    _attend(a, pointer(a[A.query], types.float32))


ATTENTION: dict[torch.dtype, Callable[..., None]] = {
    torch.bfloat16: _attend_bfloat16,
    torch.float32: _attend_float32,
}
