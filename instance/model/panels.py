"""Products of the compiled kernels: weights in panels, see ``kernels.products``."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from instance.model.kernels import usable

GRAIN = 1 << 16
"""Multiplications below which a second thread costs more than it brings."""


@functools.cache
def available(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies a type this way, and nothing does it faster."""
    if dtype not in (torch.bfloat16, torch.float32):
        return False
    try:
        from llvmlite.binding import get_host_cpu_features

        features = get_host_cpu_features()
    except Exception:
        return False
    if not features.get("avx512f"):
        return False
    # oneDNN uses the matrix unit where there is one.
    if dtype == torch.bfloat16 and (not features.get("avx512bf16") or features.get("amx-bf16")):
        return False
    return usable(dtype)


def fits(weight: Tensor) -> bool:
    """Whether [outputs, inputs] can be put into panels."""
    outputs, inputs = weight.shape
    return outputs % 16 == 0 and inputs * weight.itemsize % 4 == 0 and available(weight.dtype)


def to_panels(weight: Tensor) -> Tensor:
    """[panels, words, 48, per word] of [outputs, inputs]; outputs are filled up with zeros."""
    from instance.model.kernels.products import PANEL

    outputs, inputs = weight.shape
    per_word = 4 // weight.itemsize
    padded = torch.nn.functional.pad(weight, (0, 0, 0, -outputs % PANEL))
    words = padded.view(-1, PANEL, inputs // per_word, per_word)
    return words.transpose(1, 2).contiguous()


def multiply(
    x: Tensor,
    panels: Tensor,
    outputs: int,
    bias: Tensor | None = None,
    activation: int = 0,
    other: Tensor | None = None,
) -> Tensor:
    """[..., outputs] of [..., inputs].

    Args:
        x: Of the type of the panels.
        panels: Of the weight; of the gate's and the other's in turns, if gated.
        outputs: How many there are.
        bias: [outputs] float32, or None.
        activation: Of the gate, see ``kernels.products``, or 0.
        other: [..., outputs] to be added, or None.
    """
    from instance.model.kernels.launch import kernel
    from instance.model.kernels.products import PRODUCT

    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], outputs)
    inputs = x.shape[-1]
    if other is not None:
        other = other.contiguous()
    arguments = (
        *(0, x.numel() // inputs, inputs * x.itemsize // 4, outputs),
        *(x.data_ptr(), panels.data_ptr(), 0 if bias is None else bias.data_ptr(), activation),
        *(0 if other is None else other.data_ptr(), out.data_ptr()),
    )
    kernel(PRODUCT[x.dtype])(arguments, x.numel() * outputs < GRAIN)
    return out
