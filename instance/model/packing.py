"""Linear layers whose weights lie in the order in which oneDNN's kernels read them.

torch's own linear hands oneDNN a plain weight, which is reordered on every call (bfloat16),
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

PACKABLE = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest difference between a packed and a plain product, relative to the largest value."""
ACTIVATIONS: tuple[tuple[str, str, Callable[[Tensor], Tensor]], ...] = (
    ("swish", "", silu),
    ("gelu", "tanh", functools.partial(gelu, approximate="tanh")),
    ("gelu", "none", gelu),
)
"""Activations that a product can end with: oneDNN's name and algorithm, and what they are."""


_product = torch.ops.mkldnn._linear_pointwise


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this build of torch and this processor multiply packed weights of a type."""
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
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.detach()
        self.packed: Tensor | None = None
        # Plain attributes: parameters are slow to look up.
        self._plain: Tensor | None = weight.detach()
        self._arguments: tuple[object, ...] = ()

    def pack(self) -> bool:
        """Pack the weight and let go of the plain one, unless that computes something else."""
        weight = self._plain
        if weight is None or not can_pack(weight.dtype, weight.device):
            return False
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
        x = probe(self.in_features, weight.dtype)
        expected = linear(x, weight, self.bias)
        found = _product(x, packed, self.bias, "none", [], "")
        if not nearly_equal(expected, found, TOLERANCE[weight.dtype]):
            return False
        self._plain, self.packed = None, packed
        self._arguments = (packed, self.bias, "none", [], "")
        return True

    def forward(self, x: Tensor) -> Tensor:
        """[..., outputs] of [..., inputs]."""
        if self._plain is not None:
            return linear(x, self._plain, self.bias)
        return _product(x, *self._arguments)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, packed={self.packed is not None}"


class PackedMlp(nn.Module):
    """A gated MLP of packed layers: the activation and the gate's product end two of them.

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
        self._down: tuple[object, ...] = (down.packed, down.bias, "none", [], "")

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] of [..., width]."""
        both = _product.binary(x, _product(x, *self._gate), *self._up)
        return _product(both, *self._down)


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
