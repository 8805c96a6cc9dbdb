"""Which attention a model gets."""

from __future__ import annotations

import logging
from typing import Protocol

from torch import Tensor

from instance.executor import StepBatch
from instance.model.attention_cpu import CpuAttention
from instance.model.context import AttentionBackend
from instance.model.kernels import usable

logger = logging.getLogger(__name__)


class PagedAttention(AttentionBackend, Protocol):
    """An attention backend over a pool of KV blocks."""

    def written(self, block: int, count: int) -> None:
        """Blocks [block, block + count) were written from outside of a step."""

    def prepare(self, batch: StepBatch) -> None:
        """Take up a step; its layers follow."""


def make_attention(kv: Tensor, num_heads: int) -> PagedAttention:
    """Triton's kernels on a GPU; on the CPU a compiled kernel if there is one for this pool,
    else operators of torch.

    Args:
        kv: [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim].
        num_heads: Of queries.
    """
    if kv.is_cuda:
        from instance.model.cuda.attention import TritonAttention

        return TritonAttention(kv, num_heads)
    if usable(kv.dtype):
        from instance.model.attention_compiled import CompiledAttention

        try:
            return CompiledAttention(kv, num_heads)
        except ValueError as error:
            logger.info("attention by operators of torch: %s", error)
    return CpuAttention(kv)
