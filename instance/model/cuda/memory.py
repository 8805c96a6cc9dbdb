"""How much of a GPU's memory the KV pool gets: measured, not guessed."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

import numpy as np
import torch

from instance.executor import StepBatch
from instance.model.cuda.sizing import pool_blocks
from instance.request import SamplingParams

logger = logging.getLogger(__name__)


def largest_batch(num_tokens: int, num_rows: int, block_size: int) -> StepBatch:
    """A step that takes as much memory as any: all the tokens, and a draw in every row.

    All of it reads and writes the null block.

    Args:
        num_tokens: That a step computes at most.
        num_rows: Sequences in a step at most.
        block_size: Tokens per KV block.
    """
    rows = min(num_tokens, num_rows)
    starts = np.arange(rows + 1) * num_tokens // rows
    counts = np.diff(starts)
    nothing = np.zeros(num_tokens, dtype=np.int64)
    return StepBatch(
        number=0,
        token_ids=nothing,
        positions=np.arange(num_tokens) - np.repeat(starts[:-1], counts),
        slots=nothing,
        query_starts=starts,
        context_lens=counts,
        block_tables=np.zeros((rows, -(-int(counts.max()) // block_size)), dtype=np.int64),
        num_decodes=0,
        sample_rows=np.arange(rows),
        sample_positions=counts,
        num_outputs=np.zeros(rows, dtype=np.int64),
        sampling=[SamplingParams(top_p=0.9, top_k=50)] * rows,
        stop_token_ids=[frozenset()] * rows,
    )


def measured_blocks(
    device: torch.device,
    utilization: float,
    block_bytes: int,
    reserve: int,
    largest_step: Callable[[], None],
) -> int:
    """Blocks that fit beside weights, activations and whatever else is on the GPU.

    Args:
        device: With the model loaded.
        utilization: Share of the GPU's memory that the instance may have.
        block_bytes: Of a KV block.
        reserve: Bytes that will be taken later, by graphs and libraries.
        largest_step: Runs a step of the most tokens, with next to no KV.

    Raises:
        ValueError: if not even two blocks fit.
    """
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    largest_step()
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    # What torch has not, others have: the context, libraries, other processes.
    others = total - free - torch.cuda.memory_reserved(device)
    used = others + torch.cuda.max_memory_allocated(device)
    blocks = pool_blocks(total, utilization, used, reserve, block_bytes)
    gc.collect()
    torch.cuda.empty_cache()
    logger.info(
        "%d blocks of KV, %.1f GiB: %.1f of %.1f GiB are taken by the model and others",
        blocks,
        blocks * block_bytes / 2**30,
        used / 2**30,
        total / 2**30,
    )
    return blocks
