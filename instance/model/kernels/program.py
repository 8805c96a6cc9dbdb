"""Several kernels one after the other in one call, for layers of a model.

Between two of them the threads wait for each other. What a call costs in Python, and
entering the threads, is paid once for all of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import torch
from numba import types

from instance.model.kernels.attention import attend
from instance.model.kernels.lanes import call, pointer, pointer_to
from instance.model.kernels.launch import compiled, kernel
from instance.model.kernels.paged import A
from instance.model.kernels.products import P, product
from instance.model.kernels.rows import N, R, norm, rotary

PRODUCT, NORM, ROTARY, ATTENTION = range(4)
"""Kinds of kernels."""


class Program(NamedTuple):
    """The arguments.

    Attributes:
        counter: Not used.
        length: How many kernels.
        kernels: Address of [length, 2]: a kernel's kind and the address of its arguments.
        barrier: Address of a function that returns when all threads have called it, or 0.
    """

    counter: int
    length: int
    kernels: int
    barrier: int


G = Program(*range(len(Program._fields)))


@compiled
def _run(a, like):
    kernels = pointer(a[G.kernels], types.int64)
    for i in range(a[G.length]):
        arguments = pointer(kernels[2 * i + 1], types.int64)
        if kernels[2 * i] == PRODUCT:
            product(arguments, pointer_to(arguments[P.out], like))
        elif kernels[2 * i] == NORM:
            norm(arguments, pointer_to(arguments[N.x], like))
        elif kernels[2 * i] == ROTARY:
            rotary(arguments, pointer_to(arguments[R.query], like))
        else:
            attend(arguments, pointer_to(arguments[A.query], like))
        if a[G.barrier] != 0:
            call(a[G.barrier])


def _run_bfloat16(a):
    _run(a, pointer(a[G.counter], types.uint16))


def _run_float32(a):
    _run(a, pointer(a[G.counter], types.float32))


PROGRAM: dict[torch.dtype, Callable[..., None]] = {
    torch.bfloat16: _run_bfloat16,
    torch.float32: _run_float32,
}


def run_kernel(
    kind: int, dtype: torch.dtype, arguments: tuple[int, ...], alone: bool = False
) -> None:
    """Run one kernel.

    Args:
        kind: Which one.
        dtype: Of the tensors that it works on.
        arguments: Of its own; what they say of the counter is not read.
        alone: On this thread only.
    """
    count = len(arguments)
    space = (ctypes.c_int64 * (count + 3))(*arguments, 0, kind, 0)
    first = ctypes.addressof(space)
    space[0] = first + 8 * count
    space[count + 2] = first
    kernel(PROGRAM[dtype])((0, 1, first + 8 * (count + 1), 0), alone)
