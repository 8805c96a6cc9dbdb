"""The forward context: which attention backend the layers of a running forward pass use.

transformers calls the attention function registered here from every layer. What it cannot
pass along (block tables, slots, lengths) waits in a context that is set for the duration of
one forward pass, one per thread (the idea of nano-vllm and vLLM), so that a model needs no
change and several executors can run in one process.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

ATTENTION_NAME = "drover"
"""Name under which models are told to use our attention. No mask function is registered
for it, so transformers builds no masks."""


class AttentionOptions(NamedTuple):
    """What a layer asks of its attention besides the tensors.

    Attributes:
        scaling: Factor on query-key products.
        sliding_window: Keys visible to a query, itself included; None is all.
        softcap: Scores are squashed to softcap * tanh(score / softcap); None leaves them.
        sinks: [num_heads] logits that take part in the softmax only; None is none.
    """

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class AttentionBackend(Protocol):
    """Attention over the KV pool for the step that has been prepared."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        """Store key and value, attend, and return [1, T, num_heads, head_dim].

        Args:
            layer: Index of the layer.
            query: [1, num_heads, T, head_dim], rotated.
            key: [1, num_kv_heads, T, head_dim], rotated.
            value: [1, num_kv_heads, T, head_dim].
            options: The layer's own settings.
        """


class _Context(threading.local):
    backend: AttentionBackend | None = None


_context = _Context()


@contextlib.contextmanager
def forward_context(backend: AttentionBackend) -> Iterator[None]:
    """Let the layers of forward passes on this thread use ``backend`` inside the block."""
    before = _context.backend
    _context.backend = backend
    try:
        yield
    finally:
        _context.backend = before


def current_backend() -> AttentionBackend | None:
    """The backend of the running forward pass on this thread, or None outside of one."""
    return _context.backend


def _attention(
    module: torch.nn.Module,
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
    backend = _context.backend
    if backend is None:
        raise RuntimeError("a model with paged attention ran outside of a forward context")
    if attention_mask is not None:
        raise RuntimeError(f"{type(module).__name__} passes an attention mask of its own")
    options = AttentionOptions(
        query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap, s_aux
    )
    layer: int = module.layer_idx  # type: ignore[assignment]
    return backend.attend(layer, query, key, value, options), None


AttentionInterface.register(ATTENTION_NAME, _attention)
