"""All decoder layers of a common model as one program of the compiled kernels.

Most families of models share one layer: norm, attention, norm, gated MLP, both added to what
they were given. The calls in between, transformers' and torch's, are a good part of a decode
step of a small model. Here a step calls once for all layers. It takes their place only where
each computes the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from instance.executor import StepBatch
from instance.model.attention_compiled import CompiledAttention
from instance.model.context import AttentionOptions, current_backend
from instance.model.kernels.attention import attention
from instance.model.kernels.launch import barrier, kernel
from instance.model.kernels.paged import Attention
from instance.model.kernels.products import PRODUCT, Product
from instance.model.kernels.program import program
from instance.model.kernels.rows import NORM, ROTARY, Norm, Rotary
from instance.model.packing import PackedLinear, PanelMlp
from instance.model.parts import RmsNorm

BEFORE, AFTER = (NORM, PRODUCT, ROTARY), (PRODUCT, NORM, PRODUCT, PRODUCT)
"""The kernels of a layer before and after the attention, in their order."""
ROTATE, ATTEND = BEFORE.index(ROTARY), len(BEFORE)
LENGTH = len(BEFORE) + 1 + len(AFTER)
OTHERS = [index for index in range(LENGTH) if index != ATTEND]
FIELDS = len(Attention._fields)
"""More than any other kernel has."""


class Layer(NamedTuple):
    """What a decoder layer is made of.

    Attributes:
        norm, second_norm: Before the attention and before the MLP.
        joined: Query, key and value.
        output: Of the attention.
        mlp: The gated MLP.
        place: Its number in the KV pool.
        options: What it asks of its attention.
    """

    norm: RmsNorm
    joined: PackedLinear
    output: PackedLinear
    second_norm: RmsNorm
    mlp: PanelMlp
    place: int
    options: AttentionOptions


class Workspace:
    """What the kernels hand on to each other, for so many positions.

    Args:
        layer: Any of the layers; they are all alike.
        size: Of a head.
        capacity: Positions.
        dtype: Of all of it.
    """

    def __init__(self, layer: Layer, size: int, capacity: int, dtype: torch.dtype) -> None:
        def space(width: int) -> Tensor:
            return torch.empty(capacity, width, dtype=dtype)

        self.capacity = capacity
        heads = layer.output.in_features
        keys = (layer.joined.out_features - heads) // 2
        self.heads, self.kv_heads = heads // size, keys // size
        self.x, self.normed = space(layer.output.out_features), space(layer.output.out_features)
        self.joined = space(layer.joined.out_features)
        self.query, self.key, self.attended = space(heads), space(keys), space(heads)
        self.inner = space(layer.mlp.inner)


class FlatDecoder(nn.Module):
    """Decoder layers in one; what they were before does what this does not.

    Args:
        replaced: The layers of transformers.
        layers: What they are made of.
        size: Of a head.
    """

    def __init__(self, replaced: nn.ModuleList, layers: list[Layer], size: int) -> None:
        super().__init__()
        self.replaced = replaced
        self._before = list(replaced)
        self._layers, self._size = layers, size
        weight = layers[0].joined.panels
        assert weight is not None
        self.dtype = weight.dtype
        self.width = layers[0].output.out_features
        self._run = kernel(program)
        count = len(layers) * LENGTH
        self._arguments = np.zeros((len(layers), LENGTH, FIELDS), dtype=np.int64)
        self._counters = np.zeros(count, dtype=np.int64)
        addresses = self._arguments.ctypes.data + 8 * FIELDS * np.arange(count)
        functions = [
            *(kind[self.dtype] for kind in BEFORE),
            attention(self.dtype, size),
            *(kind[self.dtype] for kind in AFTER),
        ]
        codes = [kernel(function).address for function in functions]
        self._kernels = np.ascontiguousarray(
            np.stack([np.tile(codes, len(layers)), addresses], axis=1), dtype=np.int64
        )
        counters = self._counters.ctypes.data + 8 * np.arange(count)
        self._arguments[:, :, 0] = counters.reshape(len(layers), -1)
        self._space: Workspace | None = None
        self._backend: CompiledAttention | None = None

    def __getattr__(self, name: str) -> Any:
        # Models ask their layers for facts such as the kind of attention.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["_before"][0], name)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **others: Any,
    ) -> Tensor:
        """[1, T, width] of [1, T, width]."""
        backend = current_backend()
        if (
            hidden_states.shape[0] == 1
            and attention_mask is None
            and position_embeddings is not None
            and isinstance(backend, CompiledAttention)
        ):
            return self.run(hidden_states, position_embeddings, backend, 0, len(self._layers))
        others |= {"attention_mask": attention_mask, "position_embeddings": position_embeddings}
        for layer in self._before:
            hidden_states = layer(hidden_states, **others)
        return hidden_states

    def run(
        self,
        x: Tensor,
        embeddings: tuple[Tensor, Tensor],
        backend: CompiledAttention,
        first: int,
        last: int,
    ) -> Tensor:
        """Run the layers [first, last) of the step that ``backend`` has prepared.

        Args:
            x: [1, T, width].
            embeddings: Cosines and sines of the rotary embedding, [1, T, head_dim] each.
            backend: Attention over the KV pool.
            first, last: Which layers.
        """
        count = x.shape[1]
        space = self._space
        if space is None or space.capacity < count or self._backend is not backend:
            space = self._bind(count, backend)
        cos, sin = (one.to(self.dtype).contiguous() for one in embeddings)
        arguments = self._arguments
        # Rows and positions are the second argument of all of them.
        arguments[:, OTHERS, 1] = count
        arguments[:, ROTATE, Rotary._fields.index("cos")] = cos.data_ptr()
        arguments[:, ROTATE, Rotary._fields.index("sin")] = sin.data_ptr()
        for name, value in backend.of_step().items():
            arguments[:, ATTEND, Attention._fields.index(name)] = value
        self._counters.fill(0)
        space.x[:count] = x[0]
        each = LENGTH
        address = self._kernels.ctypes.data + 16 * each * first
        self._run((0, each * (last - first), address, barrier()))
        return space.x[None, :count].clone()

    def trial(self, count: int) -> CompiledAttention:
        """Attention with a KV pool for a sequence of so many positions alone."""
        layers = 1 + max(layer.place for layer in self._layers)
        return paged_trial(layers, self._layers[0], self._size, count)

    def _bind(self, count: int, backend: CompiledAttention) -> Workspace:
        """Write down all that does not change from step to step."""
        capacity = 1 << (count - 1).bit_length()
        space = self._space
        if space is None or space.capacity < count:
            space = Workspace(self._layers[0], self._size, capacity, self.dtype)
        for row, layer in zip(self._arguments, self._layers, strict=True):
            kernels = (
                self._norm(layer.norm, space),
                _product(space.normed, layer.joined, space.joined),
                self._rotary(space),
                self._attention(layer, space, backend),
                _product(space.attended, layer.output, space.x, space.x),
                self._norm(layer.second_norm, space),
                _gated(space.normed, layer.mlp, space.inner),
                _product(space.inner, layer.mlp.down, space.x, space.x),
            )
            for target, found in zip(row, kernels, strict=True):
                target[1 : len(found)] = found[1:]
        self._space, self._backend = space, backend
        return space

    def _norm(self, norm: RmsNorm, space: Workspace) -> Norm:
        width, weight, eps = norm.addresses
        return Norm(0, 0, width, space.x.data_ptr(), space.normed.data_ptr(), weight, eps)

    def _rotary(self, space: Workspace) -> Rotary:
        step, heads, size = space.joined.shape[1], space.heads, self._size
        first = space.joined.data_ptr()
        return Rotary(
            *(0, 0, size, 0, 0),
            *(first, heads, size, step, space.query.data_ptr()),
            *(first + heads * size * self.dtype.itemsize, space.kv_heads, size, step),
            space.key.data_ptr(),
        )

    def _attention(self, layer: Layer, space: Workspace, backend: CompiledAttention) -> Attention:
        size = self._size
        values = (space.heads + space.kv_heads) * size * self.dtype.itemsize
        return Attention(
            counter=0,
            query=space.query.data_ptr(),
            query_head=size,
            query_step=space.heads * size,
            key=space.key.data_ptr(),
            key_head=size,
            key_step=space.kv_heads * size,
            value=space.joined.data_ptr() + values,
            value_head=size,
            value_step=space.joined.shape[1],
            out=space.attended.data_ptr(),
            sinks=0,
            **backend.of_layer(layer.place, layer.options),
            **backend.of_step(),
        )


def _product(x: Tensor, linear: PackedLinear, out: Tensor, other: Tensor | None = None) -> Product:
    assert linear.panels is not None
    bias = linear.wide_bias
    return Product(
        counter=0,
        rows=0,
        depth=linear.in_features * x.itemsize // 4,
        columns=linear.out_features,
        x=x.data_ptr(),
        weight=linear.panels.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        activation=0,
        other=0 if other is None else other.data_ptr(),
        out=out.data_ptr(),
    )


def _gated(x: Tensor, mlp: PanelMlp, out: Tensor) -> Product:
    return Product(
        counter=0,
        rows=0,
        depth=x.shape[1] * x.itemsize // 4,
        columns=mlp.inner,
        x=x.data_ptr(),
        weight=mlp.panels.data_ptr(),
        bias=0,
        activation=mlp.activation,
        other=0,
        out=out.data_ptr(),
    )


def paged_trial(num_layers: int, layer: Layer, size: int, count: int) -> CompiledAttention:
    """Attention of one sequence of so many positions over itself, with a small KV pool.

    Raises:
        ValueError: if there is no kernel for it.
    """
    heads = layer.output.in_features // size
    kv_heads = (layer.joined.out_features // size - heads) // 2
    weight = layer.joined.panels
    assert weight is not None
    kv = torch.zeros(1, num_layers, 2, count, kv_heads, size, dtype=weight.dtype)
    backend = CompiledAttention(kv, heads)
    positions = np.arange(count)
    backend.prepare(
        StepBatch(
            number=0,
            token_ids=positions,
            positions=positions,
            slots=positions,
            query_starts=np.array([0, count]),
            context_lens=np.array([count]),
            block_tables=np.zeros((1, 1), dtype=np.int64),
            num_decodes=0,
            sample_rows=np.array([0]),
            sample_positions=np.array([count]),
            num_outputs=np.array([0]),
            sampling=[],
            stop_token_ids=[],
        )
    )
    return backend
