"""Compiles kernels, keeps their code, and runs them on the threads that torch computes with.

A kernel is a function of one pointer to int64 arguments, the first of which is the address
of a counter. It may run on several threads at once: each raises the counter to take a piece
of the work, until none is left.

A second pool of threads would compete with torch's, whose threads spin for a while after
each operation. Kernels therefore run inside a parallel region of the OpenMP library that
torch is linked to, entered as compilers do.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from numba import cfunc, njit
from numba.core import config

from instance.model.resolve import cache_folder


def _of_openmp(name: str) -> Any:
    """A function of torch's OpenMP, or None."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # What a library was linked to is found through it.
        return getattr(ctypes.CDLL(str(library)), name)
    except (OSError, AttributeError):
        return None


@functools.cache
def _parallel_region() -> Any:
    """``GOMP_parallel(function, argument, threads, flags)``, or None."""
    enter = _of_openmp("GOMP_parallel")
    if enter is not None:
        enter.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        enter.restype = None
    return enter


@functools.cache
def barrier() -> int:
    """Address of a function in which the threads of a running kernel wait for each other.

    It is 0 where kernels never run on several.
    """
    wait = _of_openmp("GOMP_barrier")
    if wait is None or _parallel_region() is None:
        return 0
    return ctypes.cast(wait, ctypes.c_void_p).value or 0


class Kernel:
    """A compiled kernel.

    Args:
        address: Of its code.
    """

    def __init__(self, address: int) -> None:
        self.address = address
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
        self._enter = _parallel_region() if barrier() else None

    def __call__(self, arguments: tuple[int, ...], alone: bool = False) -> None:
        """Run it on as many threads as torch uses, or on this one ``alone``.

        What the arguments say of the counter is not read.
        """
        space = (ctypes.c_int64 * (len(arguments) + 1))(*arguments, 0)
        first = ctypes.addressof(space)
        space[0] = first + 8 * len(arguments)
        threads = torch.get_num_threads()
        if alone or threads == 1 or self._enter is None:
            self._call(first)
        else:
            self._enter(self.address, first, threads, 0)


@functools.cache
def _folder() -> Path:
    """Named after the source: numba sees changes only in the file of the function itself."""
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return cache_folder() / "kernels" / hashlib.sha256(b"".join(sources)).hexdigest()[:16]


@contextlib.contextmanager
def _own_cache() -> Iterator[None]:
    # Its attributes come from the environment.
    settings: Any = config
    before = settings.CACHE_DIR
    settings.CACHE_DIR = str(_folder())
    try:
        yield
    finally:
        settings.CACHE_DIR = before


def compiled(function: Callable[..., Any]) -> Any:
    """A part of kernels, which numba compiles into those that call it."""
    with _own_cache():
        # So that what is constant where it is called is constant in it too.
        return njit(cache=True, error_model="numpy", forceinline=True)(function)


@functools.cache
def kernel(function: Callable[..., None]) -> Kernel:
    """Compile a kernel, unless its code was kept."""
    with _own_cache():
        code: Any = cfunc("void(CPointer(int64))", cache=True, error_model="numpy")(function)
    return Kernel(code.address)
