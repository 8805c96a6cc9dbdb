"""Draws the tokens of a step on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from instance.executor import StepBatch
from instance.model.cuda.sampling_kernels import sample_kernel
from instance.model.cuda.sizing import Ints
from instance.model.noise import position_key

BLOCK = 4096
"""Logits that a program looks at at a time."""
WARPS = 16
NUM_FIELDS = 5


@dataclass(slots=True)
class SamplingFields:
    """Parameters of the draws, [rows] each: as ``sample_kernel`` names them."""

    temperatures: Tensor
    top_ks: Tensor
    top_ps: Tensor
    min_ps: Tensor
    draws: Tensor

    @classmethod
    def of(cls, fields: Tensor) -> SamplingFields:
        """Views of [NUM_FIELDS, rows] integers, as ``write_sampling`` fills them."""
        reals = fields[2:].view(torch.float64)
        return cls(reals[0], fields[0], reals[1], reals[2], fields[1])


def write_sampling(batch: StepBatch, fields: Ints) -> None:
    """Parameters of a step's draws.

    Args:
        batch: Its ``sampling`` and ``sample_positions`` give the S draws.
        fields: [NUM_FIELDS, rows >= S], contiguous; rows beyond S become greedy.
    """
    fields[:] = 0
    reals = fields[2:].view(np.float64)
    for i, params in enumerate(batch.sampling):
        if params.temperature > 0:
            key = position_key(params.seed, int(batch.sample_positions[i]))
            fields[0, i] = params.top_k
            fields[1, i] = key - (1 << 64) if key >> 63 else key
            reals[:, i] = params.temperature, params.top_p, params.min_p


def draw(logits: Tensor, fields: SamplingFields, tokens: Tensor) -> None:
    """Draw a token for each row of ``logits``; see ``sampler.sample``.

    Args:
        logits: [rows, V], of any float type up to single precision.
        fields: Of the rows.
        tokens: [at least rows] int64, of which the first ones are written.
    """
    rows, size = logits.shape
    sample_kernel[(rows,)](
        logits,
        tokens,
        fields.temperatures,
        fields.top_ks,
        fields.top_ps,
        fields.min_ps,
        fields.draws,
        size,
        logits.stride(0),
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
