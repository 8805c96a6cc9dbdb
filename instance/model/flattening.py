"""Finds decoder layers that run as one, by trying whether they compute the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from instance.model.attention_compiled import CompiledAttention
from instance.model.context import forward_context
from instance.model.decoder import FlatDecoder, Layer, paged_trial
from instance.model.packing import PackedLinear, PanelMlp
from instance.model.parts import RmsNorm
from instance.model.probing import Causal, nearly_equal, probe


def flatten(layers: nn.ModuleList, tolerance: float) -> FlatDecoder | None:
    """What computes all that ``layers`` do, or None if there is none.

    Args:
        layers: Modules, perhaps decoder layers of transformers with exchanged parts.
        tolerance: Largest difference of a layer's output, relative to its largest value.
    """
    size = getattr(getattr(layers[0], "self_attn", None), "head_dim", None)
    if not isinstance(size, int) or size % 32:
        return None
    try:
        with torch.inference_mode():
            found = [_take_apart(layer, size) for layer in layers]
            known = [layer for layer in found if layer is not None]
            if len(known) < len(found) or not _alike(known):
                return None
            backend = paged_trial(1 + max(one.place for one in known), known[0], size, 3)
            flat = FlatDecoder(layers, known, size)
            same = all(
                _same(layer, flat, number, backend, size, tolerance)
                for number, layer in enumerate(layers)
            )
    except (TypeError, ValueError, AttributeError, RuntimeError):
        # Another signature, or other parts than these.
        return None
    return flat if same else None


def _take_apart(layer: Any, size: int) -> Layer | None:
    attention = layer.self_attn
    # Not asked by the name of its type, which would import in a circle.
    joined: Any = getattr(getattr(attention.q_proj, "joined", None), "linear", None)
    parts = (joined, attention.o_proj, layer.mlp.down)
    if not all(isinstance(one, PackedLinear) and one.panels is not None for one in parts):
        return None
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    if not all(isinstance(one, RmsNorm) and one.in_lanes for one in norms):
        return None
    backend = Causal()
    x = probe(attention.o_proj.out_features, joined.panels.dtype)
    with forward_context(backend):
        layer(x, position_embeddings=_embeddings(size, x.dtype))
    if len(backend.asked) != 1:
        return None
    index, options = backend.asked[0]
    if options.sinks is not None or not isinstance(layer.mlp, PanelMlp):
        return None
    return Layer(norms[0], joined, attention.o_proj, norms[1], layer.mlp, index, options)


def _alike(layers: list[Layer]) -> bool:
    shapes = {
        (one.joined.out_features, one.output.in_features, one.output.out_features, one.mlp.inner)
        for one in layers
    }
    # Layers of several kinds are given angles of their own.
    return len(shapes) == 1 and len({one.options.sliding_window for one in layers}) == 1


def _embeddings(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # Either half has angles of its own, so that another layout of the pairs shows.
    angles = probe(size, torch.float64)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _same(
    layer: Any,
    flat: FlatDecoder,
    number: int,
    backend: CompiledAttention,
    size: int,
    tolerance: float,
) -> bool:
    width, dtype = flat.width, flat.dtype
    embeddings = _embeddings(size, dtype)
    # Beside a small input what the layer adds to it shows.
    for scale in (1.0, 2.0**-6):
        x = scale * probe(width, dtype)
        with forward_context(backend):
            expected = layer(x, position_embeddings=embeddings)
        found = flat.run(x, embeddings, backend, number, number + 1)
        if not isinstance(expected, Tensor) or not nearly_equal(expected, found, tolerance):
            return False
    return True
