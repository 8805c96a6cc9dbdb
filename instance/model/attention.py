"""Which attention a model on the CPU gets."""

from __future__ import annotations

import logging
from typing import Protocol

import torch
from torch import Tensor

from instance.executor import StepBatch
from instance.model.attention_cpu import CpuAttention
from instance.model.context import AttentionBackend

COMPILED = (torch.bfloat16, torch.float32)
"""Types for which compiled kernels are worth importing numba."""

logger = logging.getLogger(__name__)


class PagedAttention(AttentionBackend, Protocol):
    """An attention backend over a pool of KV blocks."""

    def written(self, block: int, count: int) -> None:
        """Blocks [block, block + count) were written from outside of a step."""

    def prepare(self, batch: StepBatch) -> None:
        """Take up a step; its layers follow."""


def make_attention(kv: Tensor, num_heads: int) -> PagedAttention:
    """A compiled kernel if there is one for this pool, else operators of torch.

    Args:
        kv: [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim].
        num_heads: Of queries.
    """
    if kv.dtype in COMPILED:
        try:
            # Compiled, or read from a file, by being imported and made.
            from instance.model.attention_compiled import CompiledAttention

            return CompiledAttention(kv, num_heads)
        except ValueError as error:
            logger.debug("attention by operators: %s", error)
        except Exception:
            logger.warning("attention kernels cannot be compiled here", exc_info=True)
    return CpuAttention(kv)
