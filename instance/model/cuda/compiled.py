"""The layers of a model through torch.compile, for steps whose small operations count.

Attention is one opaque operation to the compiler. It finds the pool and the step through the
forward context as it runs, so that a compiled layer serves all layers and all batches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from instance.model.context import AttentionOptions, current_backend

COMPILED_NAME = "drover_compiled"
"""Name under which a model's layers call ``drover::attend``."""
BACKEND = "inductor"


@torch.library.custom_op("drover::attend", mutates_args=())
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """``AttentionBackend.attend`` of the running forward pass."""
    backend = current_backend()
    if backend is None:
        raise RuntimeError("a model with paged attention ran outside of a forward context")
    options = AttentionOptions(scaling, sliding_window, softcap, sinks)
    return backend.attend(layer, query, key, value, options)


@attend.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: int,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: int = module.layer_idx  # type: ignore[assignment]
    out = torch.ops.drover.attend(query, key, value, layer, factor, sliding_window, softcap, s_aux)
    return out, None


AttentionInterface.register(COMPILED_NAME, _attention)


def share_code() -> None:
    """Let what this thread compiles serve every layer; the setting is a thread's own.

    Else the number of a layer is a constant in the code, and each layer is compiled for itself.
    """
    torch._dynamo.config.allow_unspec_int_on_nn_module = True


def compile_layers(model: PreTrainedModel) -> None:
    """Let every decoder layer run compiled from its next call on, in place; other threads than
    this one first call ``share_code``.

    The layers share their code, so that it is compiled once and not for each of them; sizes
    are dynamic, so that prefill of any length and every bucket of decodes share it too.

    Raises:
        ValueError: if the model has no list of decoder layers.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{model.config.model_type} has no list of layers to compile")
    model.config._attn_implementation = COMPILED_NAME
    share_code()
    for layer in layers:
        layer.compile(fullgraph=True, dynamic=True, backend=BACKEND)
