"""Several kernels one after the other in one call, for layers of a model.

Between two of them the threads wait for each other. What a call costs in Python, and
entering the threads, is paid once for all of them.
"""

from __future__ import annotations

from typing import NamedTuple

from numba import types

from instance.model.kernels.lanes import call, call_with, pointer


class Program(NamedTuple):
    """The arguments.

    Attributes:
        counter: Not used.
        length: How many kernels.
        kernels: Address of [length, 2]: that of a kernel's code, and that of its arguments.
        barrier: Address of a function that returns when all threads have called it, or 0.
    """

    counter: int
    length: int
    kernels: int
    barrier: int


G = Program(*range(len(Program._fields)))


def program(a):
    kernels = pointer(a[G.kernels], types.int64)
    for i in range(a[G.length]):
        call_with(kernels[2 * i], kernels[2 * i + 1])
        if a[G.barrier] != 0:
            call(a[G.barrier])
