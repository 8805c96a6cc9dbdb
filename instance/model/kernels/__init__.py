"""Kernels for the CPU, compiled by numba when they are first used.

numba takes half a second to import, so nothing outside imports from here before ``usable``
has said yes.
"""

from __future__ import annotations

import functools
import logging

import torch

logger = logging.getLogger(__name__)


@functools.cache
def usable(dtype: torch.dtype) -> bool:
    """Whether there are kernels of a type, and small ones can be compiled or read from a file."""
    if dtype not in (torch.bfloat16, torch.float32):
        return False
    try:
        from instance.model.kernels.launch import kernel
        from instance.model.kernels.rows import NORM, ROTARY

        for functions in (NORM, ROTARY):
            kernel(functions[dtype])
    except Exception:
        logger.warning("no kernels can be compiled here: the model runs slower", exc_info=True)
        return False
    return True
