"""Inputs to try exchanged parts of a model on, and what counts as the same output."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from instance.model.context import AttentionOptions


def nearly_equal(expected: Tensor, found: Tensor, tolerance: float) -> bool:
    """Whether two tensors differ by at most ``tolerance`` of the largest value; not for NaN."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    scale = expected.abs().max().clamp_min(1e-6)
    return bool((expected - found).abs().max() <= tolerance * scale)


def probe(width: int, dtype: torch.dtype) -> Tensor:
    """[1, 3, width] of values in [-2, 2], always the same."""
    count = 3 * width
    return (2 * torch.sin(torch.arange(count) * 0.7391 + 0.1)).to(dtype).view(1, 3, width)


class Causal:
    """Attention of one sequence over itself, for a pass without KV; an ``AttentionBackend``.

    Attributes:
        asked: The layer and the options of each call, in order.
    """

    def __init__(self) -> None:
        self.asked: list[tuple[int, AttentionOptions]] = []

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        """See ``AttentionBackend.attend``; of the options only the scale is heeded."""
        self.asked.append((layer, options))
        out = scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=options.scaling, enable_gqa=True
        )
        return out.transpose(1, 2)
