"""Fewer and cheaper operations inside transformers' own model, on the CPU.

A decode step of a small model is bound by reading its weights and by the number of
operations. Some parts of a loaded model are therefore exchanged: query, key and value
projections become one product, normalisation one operation, the rotary embedding three
instead of seven per tensor, and linear layers and gated MLPs multiply packed weights (see
``packing``). Decoder layers of the common kind are then run as one (see ``decoder``). The
rest of the model's code stays transformers'; every part is exchanged only where it computes
the same as before, and all are put back if the model as a whole does not.
docs/engine-cpu.md has what each is worth.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import types
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from instance.model import panels
from instance.model.context import AttentionBackend, forward_context
from instance.model.packing import (
    ACTIVATIONS,
    Activation,
    PackedLinear,
    PackedMlp,
    PanelMlp,
    can_pack,
)
from instance.model.parts import RmsNorm, Rotary
from instance.model.probing import Causal, nearly_equal, probe
from instance.model.support import text_config

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Largest difference of a part's output, relative to its largest value."""
HALF_TOLERANCE = 0.03
MODEL_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""The same for the logits of the whole model."""
HALF_MODEL_TOLERANCE = 0.2
PROBED = 12
"""Tokens that the model is tried on."""
ROTARY = "apply_rotary_pos_emb"
"""The function that the attention layers of transformers call by this global name."""

Undo = list[Callable[[], object]]

logger = logging.getLogger(__name__)


def optimise(model: PreTrainedModel) -> bool:
    """Exchange what can be exchanged, in place; the model must be on the CPU and not train.

    Returns:
        Whether anything was; if not, the model is as it was.
    """
    undo: Undo = []
    before = _logits(model)
    try:
        for module in list(model.modules()):
            _join_projections(module, undo)
        _replace_norms(model, undo)
        _replace_rotary(model, model.dtype, undo)
        _wrap_linears(model, undo)
        same = nearly_equal(
            before, _logits(model), MODEL_TOLERANCE.get(model.dtype, HALF_MODEL_TOLERANCE)
        )
    except Exception:
        logger.debug("the model cannot run with exchanged parts", exc_info=True)
        same = False
    if not same:
        logger.warning("%s runs unoptimised: its output would differ", model.config.model_type)
        for step in reversed(undo):
            step()
        return False
    # What was exchanged can go, so that no weight is held twice for long.
    undo.clear()
    if can_pack(model.dtype, model.device):
        for module in model.modules():
            if isinstance(module, PackedLinear):
                module.pack()
        _replace_mlps(model, model.dtype)
        _flatten_layers(model)
        _release_freed_memory()
    return True


def _release_freed_memory() -> None:
    # glibc keeps what the plain weights took; other C libraries have no such call.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _logits(model: PreTrainedModel, backend: AttentionBackend | None = None) -> Tensor:
    ids = torch.arange(11, 11 + PROBED)[None] % text_config(model.config).vocab_size
    positions = torch.arange(PROBED)[None]
    with torch.inference_mode(), forward_context(backend or Causal()):
        logits: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return logits


def _exchange(parent: nn.Module, name: str, module: nn.Module, undo: Undo) -> None:
    before = getattr(parent, name)
    setattr(parent, name, module)
    undo.append(lambda: setattr(parent, name, before))


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Every module below ``model`` with its parent and its name there."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            yield parent, name, child


class JoinedLinears(nn.Module):
    """Linear layers of one input as one product, taken when the first of them is asked.

    Args:
        linears: Layers of the same input, all with a bias or all without. Their weights
            become views of the joint one.
    """

    def __init__(self, linears: list[nn.Linear]) -> None:
        super().__init__()
        weight = torch.cat([one.weight.data for one in linears])
        self._sizes = [one.out_features for one in linears]
        for one, part in zip(linears, weight.split(self._sizes), strict=True):
            one.weight.data = part
        biases = [one.bias.data for one in linears if one.bias is not None]
        self.linear = PackedLinear(weight, torch.cat(biases) if biases else None)
        # A list, since a module takes long to set an attribute.
        self._latest: list[tuple[Tensor | None, tuple[Tensor, ...]]] = [(None, ())]

    def output(self, index: int, x: Tensor) -> Tensor:
        """What the layer of this index makes of ``x``."""
        # Held, so the same object is the same input.
        latest, outputs = self._latest[0]
        if latest is not x:
            outputs = self.linear(x).split(self._sizes, -1)
            self._latest[0] = (x, outputs)
        if index == len(self._sizes) - 1:
            self._latest[0] = (None, ())
        return outputs[index]


class JoinedLinear(nn.Module):
    """One of ``JoinedLinears``, in the place of the layer that it was."""

    def __init__(self, joined: JoinedLinears, index: int) -> None:
        super().__init__()
        self.joined = joined
        self._output = functools.partial(joined.output, index)

    def forward(self, x: Tensor) -> Tensor:
        """[..., outputs] of [..., inputs]."""
        return self._output(x)


def _join_projections(module: nn.Module, undo: Undo) -> None:
    names = ("q_proj", "k_proj", "v_proj")
    linears = [getattr(module, name, None) for name in names]
    found = [one for one in linears if type(one) is nn.Linear]
    if len(found) < len(names):
        return
    if len({(one.in_features, one.bias is None) for one in found}) > 1:
        return
    joined = JoinedLinears(found)
    for index, name in enumerate(names):
        _exchange(module, name, JoinedLinear(joined, index), undo)


def _wrap_linears(model: nn.Module, undo: Undo) -> None:
    for parent, name, child in _children(model):
        if type(child) is nn.Linear:
            _exchange(parent, name, PackedLinear(child.weight, child.bias), undo)


def _replace_norms(model: nn.Module, undo: Undo) -> None:
    for parent, name, child in _children(model):
        if type(child).__name__.endswith("RMSNorm"):
            norm = _rms_norm(child)
            if norm is not None:
                _exchange(parent, name, norm, undo)


def _rms_norm(module: nn.Module) -> RmsNorm | None:
    """A norm that computes what ``module`` does, or None if none is known."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    x = probe(weight.shape[0], weight.dtype)
    tolerance = TOLERANCE.get(weight.dtype, HALF_TOLERANCE)
    half = weight.dtype in (torch.bfloat16, torch.float16)
    # The models of the Gemma family keep their factors less one, and multiply in float32.
    offset = 1 + (weight.float() if half else weight)
    for norm in (RmsNorm(weight, eps, False), RmsNorm(offset, eps, half)):
        # A second scale tells where eps is added.
        if all(
            nearly_equal(module(scale * x), norm(scale * x), tolerance) for scale in (1.0, 1e-3)
        ):
            return norm
    return None


def _replace_rotary(model: nn.Module, dtype: torch.dtype, undo: Undo) -> None:
    """Give attention layers a copy of their forward function with another global.

    The function of transformers' module itself stays, for other models in the process.
    """
    copies: dict[types.FunctionType, types.FunctionType | None] = {}
    for module in model.modules():
        forward = type(module).forward
        if not isinstance(forward, types.FunctionType) or "forward" in vars(module):
            continue
        if ROTARY not in forward.__code__.co_names or ROTARY not in forward.__globals__:
            continue
        if forward not in copies:
            copies[forward] = _with_rotary(forward, dtype)
        copy = copies[forward]
        if copy is not None:
            vars(module)["forward"] = types.MethodType(copy, module)
            undo.append(functools.partial(vars(module).pop, "forward"))


def _with_rotary(forward: types.FunctionType, dtype: torch.dtype) -> types.FunctionType | None:
    original = forward.__globals__[ROTARY]
    rotary = Rotary(original)
    # Either half has angles of its own, so that another layout of the pairs shows.
    angles = probe(32, torch.float64)
    args = (
        probe(96, dtype).view(1, 3, 3, 32).transpose(1, 2),
        probe(64, dtype).view(1, 3, 2, 32).transpose(1, 2),
        angles.cos().to(dtype),
        angles.sin().to(dtype),
    )
    try:
        pairs = list(zip(original(*args), rotary(*args), strict=True))
    except Exception:
        return None
    tolerance = TOLERANCE.get(dtype, HALF_TOLERANCE)
    if not all(nearly_equal(expected, found, tolerance) for expected, found in pairs):
        return None
    scope = {**forward.__globals__, ROTARY: rotary}
    copy = types.FunctionType(
        forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


def _replace_mlps(model: nn.Module, dtype: torch.dtype) -> None:
    """Gated MLPs of packed layers, where the two agree on some input."""
    for parent, name, child in _children(model):
        layers = [getattr(child, part, None) for part in ("gate_proj", "up_proj", "down_proj")]
        packed = [one for one in layers if isinstance(one, PackedLinear) and one.is_packed]
        activate = getattr(child, "act_fn", None)
        if len(packed) < len(layers) or not callable(activate):
            continue
        x = probe(packed[0].in_features, dtype)
        tolerance = TOLERANCE.get(dtype, HALF_TOLERANCE)
        for activation in ACTIVATIONS:
            if not nearly_equal(activation[-1](x), activate(x), tolerance):
                continue
            mlp = _mlp(packed[0], packed[1], packed[2], activation)
            if mlp is not None and nearly_equal(child(x), mlp(x), tolerance):
                setattr(parent, name, mlp)
                break


def _mlp(
    gate: PackedLinear, up: PackedLinear, down: PackedLinear, activation: Activation
) -> PanelMlp | PackedMlp | None:
    name, algorithm, number, _ = activation
    if gate.packed is not None and up.packed is not None:
        return PackedMlp(gate, up, down, (name, algorithm))
    by_kernels = gate.panels is not None and up.panels is not None
    if by_kernels and number and gate.bias is None and up.bias is None:
        return PanelMlp(gate, up, down, number)
    return None


def _flatten_layers(model: PreTrainedModel) -> None:
    """Have all decoder layers run as one, if they are alike and the logits stay what they were."""
    if not panels.available(model.dtype):
        return
    from instance.model.flattening import flatten

    tolerance = TOLERANCE.get(model.dtype, HALF_TOLERANCE)
    for parent, name, child in _children(model):
        if isinstance(child, nn.ModuleList) and len(child) > 0 and hasattr(child[0], "self_attn"):
            flat = flatten(child, tolerance)
            if flat is None:
                continue
            backend = flat.trial(PROBED)
            before = _logits(model, backend)
            setattr(parent, name, nn.ModuleList([flat]))
            found = _logits(model, backend)
            if not nearly_equal(
                before, found, MODEL_TOLERANCE.get(model.dtype, HALF_MODEL_TOLERANCE)
            ):
                kind = model.config.model_type
                logger.warning("%s keeps its layers: its output would differ", kind)
                setattr(parent, name, child)
