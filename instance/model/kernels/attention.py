"""Attention over the KV pool: one call stores a step's K and V of a layer and attends.

Scores, weights and sums are float32. Sums over keys are corrected by the running maximum,
as in flash attention (Dao et al., 2022).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from numba import types

from instance.model.kernels.lanes import pointer, take_next
from instance.model.kernels.one_query import one_query
from instance.model.kernels.paged import ITEM_WIDTH, A, I
from instance.model.kernels.several_queries import several_queries

DTYPES = {torch.bfloat16: types.uint16, torch.float32: types.float32}
COMMON = 64
"""The size of heads whose kernel is compiled for it alone: loops then have no ends to care for."""


@functools.cache
def attention(dtype: torch.dtype, head_dim: int) -> Callable[..., None]:
    """The kernel for a type in ``DTYPES`` and a size of heads."""
    return _attention(DTYPES[dtype], COMMON if head_dim == COMMON else 0)


def _attention(element: types.Type, size: int) -> Callable[..., None]:
    def attention(a):
        dim = size if size > 0 else a[A.head_dim]
        query = pointer(a[A.query], element)
        pool = pointer(a[A.pool], element)
        key, value = pointer(a[A.key], element), pointer(a[A.value], element)
        out = pointer(a[A.out], element)
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

    return attention
