"""Linear layers whose weights lie in the order in which kernels read them.

Those are the compiled kernels (see ``panels``) where they can, else oneDNN's. torch's own
linear hands oneDNN a plain weight, which is reordered on every call (bfloat16),
or calls MKL, whose thin products are slow on some machines (float32). torch's compiler
packs weights once when it freezes a model (``torch._inductor.fx_passes.mkldnn_fusion``);
here the same operators are used without compiling anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, silu

from instance.model import panels
from instance.model.probing import nearly_equal, probe

PACKABLE = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest difference between a packed and a plain product, relative to the largest value."""
Activation = tuple[str, str, int, Callable[[Tensor], Tensor]]
ACTIVATIONS: tuple[Activation, ...] = (
    ("swish", "", 1, silu),
    ("gelu", "tanh", 2, functools.partial(gelu, approximate="tanh")),
    ("gelu", "none", 0, gelu),
)
"""Activations that a product can end with: oneDNN's name and algorithm, the number in
``kernels.products`` or 0, and what they are."""
WIDE = 30_000
"""Outputs from which oneDNN computes a product, that of a vocabulary, in parts: a single one
takes twice as long for some dozens of rows."""
PART = 6144

_product = torch.ops.mkldnn._linear_pointwise


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights of a type can be packed here, of some shapes at least."""
    return device.type == "cpu" and (panels.available(dtype) or _can_reorder(dtype, device))


def _can_reorder(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this build of torch and this processor multiply weights as oneDNN orders them."""
    if device.type != "cpu" or dtype not in PACKABLE or not torch.backends.mkldnn.is_available():
        return False
    operators = torch.ops.mkldnn
    if not all(
        hasattr(operators, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    ):
        return False
    if dtype == torch.bfloat16:
        supported = getattr(operators, "_is_mkldnn_bf16_supported", None)
        return supported is not None and bool(supported())
    return True


class PackedLinear(nn.Module):
    """A linear layer that can be packed, once and for good.

    Until then it computes what the layer it was made from computes, with its weight.

    Args:
        weight: [outputs, inputs].
        bias: [outputs], or None.

    Attributes:
        panels: The weight for the compiled kernels, or None.
        wide_bias: The bias for them, in float32, or None.
        packed: The weight for oneDNN, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.detach()
        self.wide_bias = None if bias is None else bias.detach().float().contiguous()
        self.panels: Tensor | None = None
        self.packed: Tensor | None = None
        # Plain attributes: parameters are slow to look up.
        self._plain: Tensor | None = weight.detach()
        self._forward: Callable[[Tensor], Tensor] = self._by_torch

    def pack(self) -> bool:
        """Pack the weight and let go of the plain one, unless that computes something else."""
        weight = self._plain
        if weight is None:
            return False
        x = probe(self.in_features, weight.dtype)
        expected = self._by_torch(x)
        for prepare in (self._to_panels, self._to_parts, self._reorder):
            found = prepare(weight)
            if found is None:
                continue
            if nearly_equal(expected, found(x), TOLERANCE[weight.dtype]):
                self._plain, self._forward = None, found
                return True
            self.panels = self.packed = None
        return False

    def _to_panels(self, weight: Tensor) -> Callable[[Tensor], Tensor] | None:
        if weight.device.type != "cpu" or not panels.fits(weight):
            return None
        packed = self.panels = panels.to_panels(weight)
        return lambda x: panels.multiply(x, packed, self.out_features, self.wide_bias)

    def _to_parts(self, weight: Tensor) -> Callable[[Tensor], Tensor] | None:
        if self.out_features < WIDE or not _can_reorder(weight.dtype, weight.device):
            return None
        count = -(-self.out_features // PART)
        biases = [None] * count if self.bias is None else self.bias.tensor_split(count)
        parts = [
            PackedLinear(*part) for part in zip(weight.tensor_split(count), biases, strict=True)
        ]
        if not all(part.pack() for part in parts):
            return None
        return lambda x: torch.cat([part.forward(x) for part in parts], dim=-1)

    def _reorder(self, weight: Tensor) -> Callable[[Tensor], Tensor] | None:
        if not _can_reorder(weight.dtype, weight.device):
            return None
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.packed = packed
        return lambda x: _product(x, packed, self.bias, "none", [], "")

    @property
    def is_packed(self) -> bool:
        """Whether the plain weight is gone."""
        return self._plain is None

    def _by_torch(self, x: Tensor) -> Tensor:
        assert self._plain is not None
        return linear(x, self._plain, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., outputs] of [..., inputs]."""
        return self._forward(x)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, packed={self.is_packed}"


class PackedMlp(nn.Module):
    """A gated MLP of layers that oneDNN multiplies: the activation and the gate's product end
    two of them.

    Args:
        gate, up, down: Packed layers; ``gate`` and ``up`` without a bias or with.
        activation: oneDNN's name for the gate's activation, and its algorithm.
    """

    def __init__(
        self, gate: PackedLinear, up: PackedLinear, down: PackedLinear, activation: tuple[str, str]
    ) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down
        name, algorithm = activation
        # Plain attributes: submodules are slow to look up.
        self._gate: tuple[object, ...] = (gate.packed, gate.bias, name, [], algorithm)
        self._up = (up.packed, up.bias, "mul")
        self._down = down.forward

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] of [..., width]."""
        return self._down(_product.binary(x, _product(x, *self._gate), *self._up))


class PanelMlp(nn.Module):
    """A gated MLP of layers that the compiled kernels multiply: one product for gate and up.

    Args:
        gate, up: Layers with panels, without biases. They are not held.
        down: A packed layer.
        activation: The gate's, see ``kernels.products``.

    Attributes:
        panels: Of ``gate`` and ``up`` in turns.
        inner: Outputs of either.
    """

    def __init__(
        self, gate: PackedLinear, up: PackedLinear, down: PackedLinear, activation: int
    ) -> None:
        super().__init__()
        assert gate.panels is not None
        assert up.panels is not None
        self.panels = torch.stack([gate.panels, up.panels], dim=1)
        self.inner = gate.out_features
        self.activation = activation
        self.down = down
        self._down = down.forward

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] of [..., width]."""
        return self._down(panels.multiply(x, self.panels, self.inner, None, self.activation))
