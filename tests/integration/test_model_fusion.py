"""Exchanged parts compute what transformers' own do, or are not exchanged."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.cohere.modeling_cohere import CohereAttention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm

from instance.model import fusion, packing, panels
from instance.model.fusion import JoinedLinear, RmsNorm, optimise
from instance.model.loader import load_model
from instance.model.packing import PackedLinear, PackedMlp, PanelMlp, can_pack
from instance.model.probing import nearly_equal
from tests.integration.models import ARCHITECTURES, make_tiny_model

CPU = torch.device("cpu")
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.1}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def plain(folder: Path, dtype: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="drover"
    )
    return model.requires_grad_(False).eval()


def kinds(model: nn.Module) -> Counter[type]:
    return Counter(type(module) for module in model.modules())


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_same_logits(arch: str, dtype: str, tmp_path: Path) -> None:
    if dtype == "float64" and arch in ("mixtral", "gpt_oss", "qwen3_moe"):
        pytest.skip("grouped matrix products know no float64")
    folder = make_tiny_model(tmp_path, arch, dtype=dtype, max_len=128)
    model = plain(folder, dtype)
    before = fusion._logits(model)
    assert optimise(model)
    assert nearly_equal(before, fusion._logits(model), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_exchanged(dtype: str, tmp_path: Path) -> None:
    if not can_pack(getattr(torch, dtype), CPU):
        pytest.skip("no packed products here")
    model = load_model(make_tiny_model(tmp_path, "llama", layers=2), dtype)
    found = kinds(model)
    assert found[nn.Linear] == 0
    assert found[JoinedLinear] == 6
    assert found[PackedMlp] + found[PanelMlp] == 2
    assert found[RmsNorm] == 5
    # Two joined projections, two outputs, the head, and of each MLP three or only the last.
    assert found[PackedLinear] == 2 + 2 + 1 + 2 + 2 * found[PackedMlp]
    for module in model.modules():
        if isinstance(module, PackedLinear):
            assert module.is_packed
            assert not list(module.parameters())
        if isinstance(module, LlamaAttention):
            assert "forward" in vars(module)


FLAT = {"llama": {}, "qwen2": {}, "mistral": {"sliding_window": 5}}
"""Architectures whose layers are of the common kind."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_layers_as_one(arch: str, dtype: str, tmp_path: Path) -> None:
    """Common layers run as one, with the same logits; others stay."""
    if not panels.available(getattr(torch, dtype)):
        pytest.skip("no products of compiled kernels here")
    more = FLAT.get(arch, {})
    folder = make_tiny_model(tmp_path, arch, dtype=dtype, max_len=128, hidden=128, **more)
    model = load_model(folder, dtype)
    names = [type(one).__name__ for one in model.modules()]
    assert names.count("FlatDecoder") == (arch in FLAT)
    if arch not in FLAT:
        return
    [flat] = model.model.layers
    found = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        found.append(fusion._logits(model, flat.trial(fusion.PROBED)))
    before = fusion._logits(plain(folder, dtype), flat.trial(fusion.PROBED))
    assert nearly_equal(before, found[0], TOLERANCE[dtype])
    assert all(torch.equal(one, found[0]) for one in found)
    # Under another attention the layers are what they were.
    before = fusion._logits(plain(folder, dtype))
    assert nearly_equal(before, fusion._logits(model), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_by_onednn(arch: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no kernels for products."""
    monkeypatch.setattr(panels, "available", lambda dtype: False)
    if not can_pack(getattr(torch, dtype), CPU):
        pytest.skip("oneDNN packs no weights here")
    folder = make_tiny_model(tmp_path, arch, dtype=dtype, max_len=128)
    model = plain(folder, dtype)
    before = fusion._logits(model)
    assert optimise(model)
    found = kinds(model)
    assert found[PackedMlp] == 3
    assert found[PanelMlp] == 0
    assert all(one.panels is None for one in model.modules() if isinstance(one, PackedLinear))
    assert nearly_equal(before, fusion._logits(model), TOLERANCE[dtype])


def test_a_layer_that_adds_something_else_keeps_them_all(tmp_path: Path) -> None:
    if not panels.available(torch.float32):
        pytest.skip("no products of compiled kernels here")
    model = plain(make_tiny_model(tmp_path, "llama", hidden=128), "float32")
    layer = model.model.layers[1]

    def forward(self: nn.Module, x: Tensor, **others: object) -> Tensor:
        return x + 1.01 * (type(self).forward(self, x, **others) - x)

    layer.forward = types.MethodType(forward, layer)
    before = fusion._logits(model)
    assert optimise(model)
    assert len(model.model.layers) == 3
    assert nearly_equal(before, fusion._logits(model), 1e-4)


def test_float64_keeps_its_norms_and_weights(tmp_path: Path) -> None:
    """Models normalise in float32 whatever their type: another order of it shows in float64."""
    model = load_model(make_tiny_model(tmp_path, "llama", layers=2), "float64")
    found = kinds(model)
    assert found[LlamaRMSNorm] == 5
    assert found[JoinedLinear] == 6
    assert found[PackedMlp] + found[PanelMlp] == 0
    assert not any(m.is_packed for m in model.modules() if isinstance(m, PackedLinear))


def test_a_model_that_cannot_stays_as_it_is(tmp_path: Path) -> None:
    model = plain(make_tiny_model(tmp_path, "llama", layers=2), "float32")
    before, kinds_before = fusion._logits(model), kinds(model)
    attention = model.model.layers[1].self_attn

    def forward(self: LlamaAttention, *args: object, **kwargs: object) -> object:
        assert self.o_proj.weight.dim() == 2
        return LlamaAttention.forward(self, *args, **kwargs)

    attention.forward = types.MethodType(forward, attention)
    assert not optimise(model)
    assert kinds(model) == kinds_before
    assert torch.equal(fusion._logits(model), before)
    assert "forward" not in vars(model.model.layers[0].self_attn)


def test_other_models_of_the_class_are_untouched(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "llama", layers=2)
    other = plain(folder, "float32")
    before = fusion._logits(other)
    assert optimise(plain(folder, "float32"))
    assert torch.equal(fusion._logits(other), before)


class CentredRMSNorm(nn.Module):
    """Named like what it is not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8), requires_grad=False)
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def test_a_norm_that_computes_something_else_is_kept() -> None:
    assert fusion._rms_norm(CentredRMSNorm()) is None
    assert fusion._rms_norm(LlamaRMSNorm(8, eps=1e-6).requires_grad_(False)) is not None
    # Where eps is added shows with small values only.
    outside = LlamaRMSNorm(8, eps=1e-6).requires_grad_(False)
    outside.forward = lambda x: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6)
    assert fusion._rms_norm(outside) is None


def test_interleaved_rotary_is_kept() -> None:
    assert fusion._with_rotary(CohereAttention.forward, torch.float32) is None
    assert fusion._with_rotary(LlamaAttention.forward, torch.float32) is not None


def test_joined_layers_with_inputs_of_their_own() -> None:
    layers = [nn.Linear(6, size, bias=True).requires_grad_(False) for size in (4, 2, 3)]
    joined = fusion.JoinedLinears(layers)
    a, b = torch.randn(2, 1, 5, 6)
    for order in ((a, a, a), (a, b, a), (b, b, a)):
        for index, x in enumerate(order):
            torch.testing.assert_close(joined.output(index, x), layers[index](x))


def test_packing() -> None:
    for dtype in packing.PACKABLE:
        if not can_pack(dtype, CPU):
            continue
        layer = nn.Linear(48, 40).to(dtype).requires_grad_(False)
        packed = PackedLinear(layer.weight, layer.bias)
        x = torch.randn(7, 48).to(dtype)
        assert torch.equal(packed(x), layer(x))
        assert packed.pack()
        assert not packed.pack()
        assert nearly_equal(layer(x), packed(x), packing.TOLERANCE[dtype])
    wide = nn.Linear(4, 4).double()
    assert not PackedLinear(wide.weight, None).pack()


def test_nearly_equal() -> None:
    one = torch.tensor([1.0, -100.0])
    assert nearly_equal(one, one + 0.9, 0.01)
    assert not nearly_equal(one, one + 1.1, 0.01)
    assert not nearly_equal(one, torch.tensor([1.0, float("nan")]), 0.01)
    assert not nearly_equal(one, one.double(), 0.01)
    assert not nearly_equal(one, one[:1], 0.01)
