"""Loads a transformers model with our attention, checked to be right."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from instance.executor import ModelDescription
from instance.model.context import ATTENTION_NAME
from instance.model.fusion import optimise
from instance.model.resolve import ModelNotFoundError, Progress, no_progress_bars, resolve_model
from instance.model.support import (
    UnsupportedModelError,
    attention_shape,
    check_chunked,
    check_supported,
    text_config,
)

__all__ = [
    "ModelNotFoundError",
    "UnsupportedModelError",
    "check_supported",
    "describe",
    "load_model",
    "resolve_model",
]

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_dtype(name: str, config: Any, device: str) -> torch.dtype:
    """The torch dtype of a setting; "auto" is the checkpoint's, except that float16 runs as
    float32 on the CPU, where it is slow.

    Raises:
        ValueError: if there is no such setting.
    """
    if name != "auto":
        if name not in DTYPES:
            raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}, not {name!r}")
        return DTYPES[name]
    found = getattr(config, "dtype", None) or getattr(text_config(config), "dtype", None)
    dtype = getattr(torch, found) if isinstance(found, str) else found or torch.float32
    if device == "cpu" and dtype == torch.float16:
        return torch.float32
    return dtype


def load_model(
    path: str | os.PathLike[str],
    dtype: str = "auto",
    device: str = "cpu",
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Load a causal language model so that its layers call our attention, and check it.

    Args:
        path: Local folder, see ``resolve_model``.
        dtype: "auto" or the name of a torch float type.
        device: Where its weights go.
        progress: Told the stages "loading weights" and "warming up".

    Raises:
        UnsupportedModelError: if it would be wrong.
        ValueError: if ``dtype`` is unknown.
    """
    report = progress or (lambda stage: None)
    folder = Path(path)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    check_supported(config, _model_class(config))
    report("loading weights")
    torch_dtype = resolve_dtype(dtype, config, device)
    # Grouped matrix products know no float64.
    more: dict[str, Any] = {}
    if torch_dtype == torch.float64:
        more["experts_implementation"] = "eager"
    if device != "cpu":
        # Weights go from the file to the device, without a copy of the model in main memory.
        more["device_map"] = {"": torch.device(device)}
    with no_progress_bars():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch_dtype,
            attn_implementation=ATTENTION_NAME,
            local_files_only=True,
            **more,
        )
    model.requires_grad_(False)
    model.train(False)
    report("warming up")
    shape = attention_shape(model)
    if device == "cpu":
        optimise(model)
    check_chunked(model, shape)
    return model


def _model_class(config: Any) -> type:
    try:
        found = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise UnsupportedModelError(
            f"{config.model_type} is not supported: it is no causal language model"
        ) from None
    model_class = found[0] if isinstance(found, tuple) else found
    assert isinstance(model_class, type)
    return model_class


def describe(
    model: PreTrainedModel, name: str, block_size: int, max_model_len: int
) -> ModelDescription:
    """The static facts of a loaded model.

    Args:
        model: As ``load_model`` returned it.
        name: Name under which it is served.
        block_size: Tokens per KV block.
        max_model_len: Tokens of a sequence at most, as set; the model's own limit holds too.
    """
    config = text_config(model.config)
    shape = attention_shape(model)
    limit = getattr(config, "max_position_embeddings", None) or max_model_len
    return ModelDescription(
        name=name,
        dtype=str(model.dtype).removeprefix("torch."),
        block_size=block_size,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=config.vocab_size,
        max_model_len=min(limit, max_model_len),
        eos_token_ids=_eos_token_ids(model.generation_config, model.config),
    )


def _eos_token_ids(generation: GenerationConfig | None, config: Any) -> tuple[int, ...]:
    """End-of-sequence tokens; those of the generation settings count, where there are any."""
    for source in (generation, config, text_config(config)):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    return ()
