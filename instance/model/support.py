"""Which models compute the right thing with our attention, and which are refused.

Some architectures ignore the attention function without an error, or depend on more than
the block table says. They are refused by what their configuration and class declare, and
what those do not tell is found out by running the model on a few tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from instance.executor import StepBatch
from instance.model.attention import make_attention
from instance.model.context import AttentionOptions, forward_context

LAYER_TYPES = ("full_attention", "sliding_attention")
"""Layer types whose state is one K and one V per token."""
BATCH_DEPENDENT_ROPE = ("dynamic", "longrope", "su")
"""Rotary embeddings whose frequencies depend on the longest position of the whole batch."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}
"""Largest difference of logits, relative to the largest logit, between two ways to cut the
same tokens into steps; half precision is held to HALF_TOLERANCE."""
HALF_TOLERANCE = 0.2


class UnsupportedModelError(ValueError):
    """The model would not run, or would run and be wrong; the message says why."""


class AttentionShape(NamedTuple):
    """What a layer keeps per token: K and V of [num_kv_heads, head_dim]."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the language model."""
    return config.get_text_config(decoder=True)


def check_supported(config: Any, model_class: type) -> None:
    """Refuse what is known to be wrong, before any weight is loaded.

    Args:
        config: The model's transformers configuration.
        model_class: The class that would be made from it.

    Raises:
        UnsupportedModelError: with the reason.
    """
    for reason in _objections(config, text_config(config), model_class):
        raise UnsupportedModelError(f"{config.model_type} is not supported: {reason}")


def _objections(config: Any, text: Any, model_class: type) -> Iterator[str]:
    if config.is_encoder_decoder:
        yield "it is an encoder-decoder model"
    if getattr(model_class, "_is_stateful", False):
        yield "it has recurrent layers, whose state is not KV"
    if not getattr(model_class, "_supports_attention_backend", False):
        yield f"{model_class.__name__} ignores attention functions other than its own"
    other = set(getattr(text, "layer_types", None) or ()) - set(LAYER_TYPES)
    if other:
        yield f"layers of type {', '.join(sorted(other))}"
    for rope_type in sorted(_rope_types(text)):
        if rope_type in BATCH_DEPENDENT_ROPE:
            yield (
                f"rotary embedding of type {rope_type} depends on the longest position of the "
                "whole batch"
            )
    if getattr(text, "num_kv_shared_layers", 0):
        yield "layers share the KV of others"
    if getattr(text, "use_bidirectional_attention", False):
        yield "its attention is bidirectional"
    if getattr(text, "kv_lora_rank", None) and _mla_dims_differ(text):
        yield "latent attention with a value head dimension other than that of the keys"


def _rope_types(config: Any) -> set[str]:
    """Rotary types of all layer types, from the present and the older attribute."""
    found: set[str] = set()
    for name in ("rope_parameters", "rope_scaling"):
        parameters = getattr(config, name, None) or {}
        nested = [value for value in parameters.values() if isinstance(value, dict)]
        for one in nested or [parameters]:
            kind = one.get("rope_type", one.get("type"))
            if kind is not None:
                found.add(str(kind))
    return found


def _mla_dims_differ(config: Any) -> bool:
    key = (getattr(config, "qk_nope_head_dim", 0) or 0) + (
        getattr(config, "qk_rope_head_dim", 0) or 0
    )
    return bool(key != getattr(config, "v_head_dim", key))


class _Call(NamedTuple):
    layer: int
    key_shape: tuple[int, int]
    value_shape: tuple[int, int]
    options: AttentionOptions


class _Recorder:
    """An attention backend that only notes how it was called."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        self.calls.append(
            _Call(layer, (key.shape[1], key.shape[3]), (value.shape[1], value.shape[3]), options)
        )
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


def attention_shape(model: PreTrainedModel) -> AttentionShape:
    """The shape of the model's KV, found by one forward pass of two tokens.

    Raises:
        UnsupportedModelError: unless every layer calls our attention exactly once, with the
            same shape of K and V and with the window and cap that the configuration says.
    """
    config = text_config(model.config)
    name = model.config.model_type
    recorder = _Recorder()
    with torch.inference_mode(), forward_context(recorder):
        device = next(model.parameters()).device
        ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
        model(input_ids=ids, position_ids=torch.arange(2, device=device)[None], use_cache=False)
    calls = sorted(recorder.calls, key=lambda call: call.layer)
    layers = config.num_hidden_layers
    if [call.layer for call in calls] != list(range(layers)):
        raise UnsupportedModelError(
            f"{name} is not supported: our attention was called by layers "
            f"{[call.layer for call in calls]} instead of once by each of {layers}"
        )
    shapes = {shape for call in calls for shape in (call.key_shape, call.value_shape)}
    if len(shapes) != 1:
        raise UnsupportedModelError(
            f"{name} is not supported: its K and V are not of one shape in all layers: "
            f"{sorted(shapes)}"
        )
    for call in calls:
        _check_options(name, config, call)
    heads, head_dim = shapes.pop()
    return AttentionShape(layers, heads, head_dim)


def _check_options(name: str, config: Any, call: _Call) -> None:
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        if layer_types[call.layer] != "sliding_attention":
            window = None
    elif getattr(config, "use_sliding_window", True) is False:
        window = None
    if call.options.sliding_window != window:
        raise UnsupportedModelError(
            f"{name} is not supported: layer {call.layer} has a sliding window of {window} but "
            f"tells its attention {call.options.sliding_window}"
        )
    softcap = getattr(config, "attn_logit_softcapping", None)
    if call.options.softcap != softcap:
        raise UnsupportedModelError(
            f"{name} is not supported: scores are capped at {softcap} but layer {call.layer} "
            f"tells its attention {call.options.softcap}"
        )


def check_chunked(model: PreTrainedModel, shape: AttentionShape) -> None:
    """Compare one forward pass with the same tokens cut into chunks beside another sequence.

    This finds state outside of the KV and computations that mix a batch's rows.

    Raises:
        UnsupportedModelError: if the logits differ by more than rounding.
    """
    parameter = next(model.parameters())
    size, blocks = 4, 8
    dims = (blocks, shape.num_layers, 2, size, shape.num_kv_heads, shape.head_dim)
    heads = text_config(model.config).num_attention_heads
    device = parameter.device
    attention = make_attention(
        torch.full(dims, torch.nan, dtype=parameter.dtype, device=device), heads
    )
    ids = np.arange(20, 30) % text_config(model.config).vocab_size
    ones, others = ids[:7], ids[:-5:-1]

    def run(*rows: tuple[np.ndarray, int, list[int]]) -> list[Tensor]:
        """Logits after each row of (tokens, start, block table)."""
        counts = [len(tokens) for tokens, _, _ in rows]
        ends = np.cumsum(counts)
        positions = [start + np.arange(len(tokens)) for tokens, start, _ in rows]
        tables = np.array([table for _, _, table in rows])
        slots = [
            np.array(table)[at // size] * size + at % size
            for (_, _, table), at in zip(rows, positions, strict=True)
        ]
        attention.prepare(
            StepBatch(
                number=0,
                token_ids=np.concatenate([tokens for tokens, _, _ in rows]),
                positions=np.concatenate(positions),
                slots=np.concatenate(slots),
                query_starts=np.concatenate([[0], ends]),
                context_lens=np.array([start + len(tokens) for tokens, start, _ in rows]),
                block_tables=tables,
                num_decodes=0,
                sample_rows=np.arange(len(rows)),
                sample_positions=np.zeros(len(rows), dtype=np.int64),
                num_outputs=np.zeros(len(rows), dtype=np.int64),
                sampling=[],
                stop_token_ids=[],
            )
        )
        with torch.inference_mode(), forward_context(attention):
            every = np.concatenate([tokens for tokens, _, _ in rows])
            logits: Tensor = model(
                input_ids=torch.from_numpy(every).to(device)[None],
                position_ids=torch.from_numpy(np.concatenate(positions)).to(device)[None],
                use_cache=False,
                logits_to_keep=torch.from_numpy(ends - 1).to(device),
            ).logits[0]
        return list(logits)

    whole = run((ones, 0, [1, 2]))[0]
    run((others, 0, [5, 6]), (ones[:4], 0, [4, 3]))
    run((ones[4:6], 4, [4, 3]), (others[:1], 4, [5, 6]))
    chunked = run((others[1:2], 5, [5, 6]), (ones[6:], 6, [4, 3]))[1]
    error = float((whole - chunked).abs().max() / whole.abs().max().clamp_min(1e-6))
    if not error <= TOLERANCE.get(parameter.dtype, HALF_TOLERANCE):
        raise UnsupportedModelError(
            f"{model.config.model_type} is not supported: its output depends on how its tokens "
            f"are cut into steps (relative difference of the logits: {error:.2g})"
        )
