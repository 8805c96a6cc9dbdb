"""Models that would be wrong are refused, each with its reason."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from instance.model.context import ATTENTION_NAME, AttentionOptions, forward_context
from instance.model.loader import UnsupportedModelError, load_model
from instance.model.support import attention_shape, check_chunked, check_supported
from tests.integration.models import BASE_VOCAB, make_tiny_model, tiny_config

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 4.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 32,
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bloom": ("BloomConfig", {"vocab_size": 64}, "ignores attention functions"),
    "falcon": ("FalconConfig", {"vocab_size": 64}, "ignores attention functions"),
    "gptj": ("GPTJConfig", {"vocab_size": 64, "n_layer": 2}, "ignores attention functions"),
    "mpt": ("MptConfig", {"vocab_size": 64, "n_layers": 2}, "ignores attention functions"),
    "stablelm": ("StableLmConfig", COMMON, "ignores attention functions"),
    "dynamic rope": (
        "LlamaConfig",
        {**COMMON, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "type dynamic",
    ),
    "longrope": ("Phi3Config", {**COMMON, "rope_parameters": LONG}, "type longrope"),
    "chunked attention": ("Llama4TextConfig", COMMON, "chunked_attention"),
    "mamba": ("MambaConfig", {"vocab_size": 64, "hidden_size": 32}, "recurrent"),
    "hybrid": ("Qwen3NextConfig", COMMON, "recurrent"),
    "conv": (
        "Lfm2Config",
        {**COMMON, "layer_types": ["conv", "full_attention"]},
        "layers of type conv",
    ),
    "encoder-decoder": ("BartConfig", {"vocab_size": 64}, "encoder-decoder"),
    "shared KV": ("Gemma3nTextConfig", {"num_kv_shared_layers": 1}, "share the KV"),
    "bidirectional": (
        "Gemma3TextConfig",
        {**COMMON, "use_bidirectional_attention": True},
        "bidirectional",
    ),
    "latent attention": (
        "DeepseekV3Config",
        {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
        "value head dimension",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_configuration(case: str, tmp_path: Path) -> None:
    """``load_model`` refuses before it looks for weights: there are none in the folder."""
    name, settings, reason = REFUSED[case]
    config = getattr(transformers, name)(**settings)
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=reason):
        load_model(tmp_path)


def test_refused_without_a_causal_model(tmp_path: Path) -> None:
    transformers.T5Config(vocab_size=64).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no causal language model"):
        load_model(tmp_path)


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3"])
def test_supported(arch: str) -> None:
    config = tiny_config(arch, 64, 3, BASE_VOCAB, 128)
    check_supported(config, AutoModelForCausalLM._model_mapping[type(config)])


def test_yarn_is_supported(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "llama")
    config = transformers.AutoConfig.from_pretrained(folder)
    config.rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    config.save_pretrained(folder)
    assert load_model(folder).config.rope_parameters["rope_type"] == "yarn"


def paged(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float64, attn_implementation=ATTENTION_NAME
    ).eval()


def test_refused_when_the_window_is_only_in_the_mask() -> None:
    """Phi-MoE does not tell its attention of its sliding window."""
    config = transformers.PhimoeConfig(
        **COMMON, num_local_experts=2, sliding_window=8, experts_implementation="eager"
    )
    with pytest.raises(UnsupportedModelError, match="sliding window of 8"):
        attention_shape(paged(config))


def test_refused_when_a_layer_keeps_its_own_attention() -> None:
    model = paged(tiny_config("llama", 64, 3, BASE_VOCAB, 128))

    class Own(nn.Module):
        def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
            return hidden_states, None

    model.model.layers[1].self_attn = Own()
    with pytest.raises(UnsupportedModelError, match=r"layers \[0, 2\] instead of once"):
        attention_shape(model)


def test_refused_when_layers_differ_in_shape() -> None:
    model = paged(tiny_config("llama", 64, 2, BASE_VOCAB, 128))
    odd = paged(tiny_config("llama", 64, 2, BASE_VOCAB, 128, num_key_value_heads=1))
    model.model.layers[1].self_attn = odd.model.layers[1].self_attn
    with pytest.raises(UnsupportedModelError, match="one shape"):
        attention_shape(model)


def test_refused_when_tokens_mix_outside_of_attention() -> None:
    """A token shift, as recurrent layers have it, crosses from one row to the next."""

    class Shifted(LlamaForCausalLM):
        def forward(self, input_ids: Tensor, **more: Any) -> Any:  # type: ignore[override]
            embedded = self.get_input_embeddings()(input_ids)
            return super().forward(inputs_embeds=embedded + embedded.roll(1, dims=1), **more)

    config = tiny_config("llama", 64, 3, BASE_VOCAB, 128)
    config._attn_implementation = ATTENTION_NAME
    model = Shifted(config).double().eval()
    shape = attention_shape(model)
    with pytest.raises(UnsupportedModelError, match="cut into steps"):
        check_chunked(model, shape)
    check_chunked(paged(config), shape)


class _Silent:
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        return query.transpose(1, 2)


@pytest.fixture
def attention() -> Any:
    return transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS[ATTENTION_NAME]


def test_attention_needs_a_context_and_no_mask(attention: Any) -> None:
    module = SimpleNamespace(layer_idx=0)
    tensor = torch.zeros(1, 2, 3, 4)
    with pytest.raises(RuntimeError, match="outside of a forward context"):
        attention(module, tensor, tensor, tensor)
    with forward_context(_Silent()):
        assert attention(module, tensor, tensor, tensor)[0].shape == (1, 3, 2, 4)
        with pytest.raises(RuntimeError, match="mask of its own"):
            attention(module, tensor, tensor, tensor, attention_mask=torch.zeros(3, 3))
    with pytest.raises(RuntimeError, match="outside of a forward context"):
        attention(module, tensor, tensor, tensor)
