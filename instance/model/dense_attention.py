"""Attention over keys and values that lie side by side, with caps and sinks, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from instance.model.context import AttentionOptions


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    options: AttentionOptions,
    sinks: Tensor | None,
    causal: bool = False,
) -> Tensor:
    """Attention of [B, H, T, D] over [B, H, S, D].

    ``mask`` and ``sinks`` broadcast with the scores; ``causal`` needs T = S and no mask.
    """
    if options.softcap is None and sinks is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=options.scaling
        )
    scores = torch.matmul(query, key.transpose(-1, -2))
    if scores.dtype != torch.float64:
        scores = scores.float()
    scores *= options.scaling
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    if mask is not None:
        scores += mask
    elif causal:
        length = query.shape[2]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores.masked_fill_(hidden, -math.inf)
    if sinks is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        extra = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, extra], dim=-1), dim=-1)[..., :-1]
    return torch.matmul(weights.to(value.dtype), value)
