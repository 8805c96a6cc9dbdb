"""Norms and rotary embeddings of transformers' models as one operation each.

Compiled kernels compute them where there are any, operators of torch otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from instance.model.kernels import usable

GRAIN = 32768
"""Elements below which a second thread costs more than it brings."""


class RmsNorm(nn.Module):
    """Root mean square normalisation.

    Args:
        weight: [width] factors.
        eps: Added to the mean square.
        wide: Multiply in float32 where the weight is float32 and the input is not.

    Attributes:
        in_lanes: Kernels can compute it.
        addresses: The width, and for kernels where its factors and what is added lie.
    """

    def __init__(self, weight: Tensor, eps: float, wide: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        width = weight.shape[0]
        # Parameters are slow to look up.
        self._settings = ((width,), self.weight.data, eps)
        self._wide = wide
        self.in_lanes = width % 16 == 0
        self._weight = weight.detach().float().contiguous()
        self._eps = torch.tensor([eps], dtype=torch.float32)
        self.addresses = (width, self._weight.data_ptr(), self._eps.data_ptr())

    def forward(self, x: Tensor) -> Tensor:
        """The shape and type of ``x``, normalised over the last dimension."""
        if self.in_lanes and x.is_contiguous() and usable(x.dtype):
            return self._by_kernel(x)
        if self._wide:
            return rms_norm(x.float(), *self._settings).to(x.dtype)
        return rms_norm(x, *self._settings)

    def _by_kernel(self, x: Tensor) -> Tensor:
        from instance.model.kernels.launch import kernel
        from instance.model.kernels.rows import NORM

        width, weight, eps = self.addresses
        out, count = torch.empty_like(x), x.numel()
        arguments = (0, count // width, width, x.data_ptr(), out.data_ptr(), weight, eps)
        kernel(NORM[x.dtype])(arguments, count < GRAIN)
        return out


class Rotary:
    """Rotary position embedding of query and key.

    Args:
        original: What computes the shapes and types that this does not.
    """

    def __init__(self, original: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self._original = original
        self._known: dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Query and key rotated; cos and sin are [1, T, head_dim]."""
        size = q.shape[-1]
        if size != sin.shape[-1] or q.dtype != sin.dtype:
            return self._original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        if (
            size % 32 == 0
            and unsqueeze_dim == 1
            and q.dim() == 4
            and q.shape[0] == cos.shape[0] == 1
            and all(x.stride(-1) == 1 for x in (q, k))
            and cos.is_contiguous()
            and sin.is_contiguous()
            and usable(q.dtype)
        ):
            return self._by_kernel(q, k, cos, sin)
        return self._by_operators(q, k, cos, sin, unsqueeze_dim)

    def _by_kernel(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        from instance.model.kernels.launch import kernel
        from instance.model.kernels.rows import ROTARY

        _, heads, positions, size = q.shape
        kv_heads = k.shape[1]
        out = q.new_empty(1, positions, heads, size)
        key_out = k.new_empty(1, positions, kv_heads, size)
        arguments = (
            *(0, positions, size, cos.data_ptr(), sin.data_ptr()),
            *(q.data_ptr(), heads, q.stride(1), q.stride(2), out.data_ptr()),
            *(k.data_ptr(), kv_heads, k.stride(1), k.stride(2), key_out.data_ptr()),
        )
        kernel(ROTARY[q.dtype])(arguments, q.numel() < GRAIN)
        return out.transpose(1, 2), key_out.transpose(1, 2)

    def _by_operators(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int
    ) -> tuple[Tensor, Tensor]:
        """Three operations each: the halves are swapped whole and the sign goes to the sine.

        That is done once per step, since layers are given the same cosine and sine, or one
        of a few pairs.
        """
        key = (id(cos), id(sin), unsqueeze_dim)
        known = self._known.get(key)
        half = q.shape[-1] // 2
        if known is None:
            if len(self._known) >= 4:
                self._known.clear()
            signed = torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)
            # The originals are held so that their ids stay theirs.
            known = (cos, sin, cos.unsqueeze(unsqueeze_dim), signed.unsqueeze(unsqueeze_dim))
            self._known[key] = known
        _, _, cos, signed = known
        return (
            torch.addcmul(q * cos, q.roll(half, -1), signed),
            torch.addcmul(k * cos, k.roll(half, -1), signed),
        )
