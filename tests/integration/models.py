"""Tiny models with random weights, saved as ordinary folders that a cluster can serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

SPECIAL_TOKENS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
BASE_VOCAB = 256 + len(SPECIAL_TOKENS)
PRINTABLE = range(32, 127)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte (ids 0 to 255 in the order of the bytes), then the special tokens."""
    names = _byte_names()
    tokenizer = Tokenizer(BPE(vocab={name: byte for byte, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _byte_names() -> list[str]:
    """How byte-level BPE spells each byte: itself if printable, else a letter from 256 on."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


# What sets each architecture apart is made to matter at a few dozen tokens: narrow windows,
# low caps, factors other than 1.
ARCHITECTURES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "mistral": (MistralConfig, {"sliding_window": 10}),
    "gemma2": (
        Gemma2Config,
        {"sliding_window": 9, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 20.0},
    ),
    "gemma3": (Gemma3TextConfig, {"sliding_window": 24}),
    "phi3": (Phi3Config, {"sliding_window": 13}),
    "olmo2": (Olmo2Config, {}),
    "granite": (
        GraniteConfig,
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.4,
            "logits_scaling": 1.5,
        },
    ),
    "gpt_oss": (
        GptOssConfig,
        {
            "sliding_window": 11,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 2},
    ),
    "opt": (OPTConfig, {}),
    "gpt2": (GPT2Config, {}),
}
"""Configuration class of each architecture, and what is set apart from the common sizes."""


def tiny_config(
    arch: str, hidden: int, layers: int, vocab: int, max_len: int, **more: Any
) -> PreTrainedConfig:
    """A small configuration: 4 heads, sharing 2 of K and V where the architecture can.

    Args:
        arch: One of ARCHITECTURES. Of three layers of "gemma3" two have a window.
        hidden: Width, a multiple of 4.
        layers: Number of layers.
        vocab: Vocabulary size, at least BASE_VOCAB.
        max_len: Longest position.
        more: Further settings of the configuration.
    """
    config_class, own = ARCHITECTURES[arch]
    common: dict[str, Any] = {
        "vocab_size": vocab,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": [257, 259],
        "pad_token_id": None,
    }
    if arch == "gpt2":
        sizes = {"n_embd": hidden, "n_layer": layers, "n_head": 4, "n_positions": max_len}
    else:
        sizes = {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "max_position_embeddings": max_len,
        }
    if arch == "opt":
        sizes |= {"ffn_dim": 2 * hidden, "word_embed_proj_dim": hidden}
        common |= {"init_std": common.pop("initializer_range")}
    elif arch != "gpt2":
        sizes |= {
            "intermediate_size": 2 * hidden,
            "num_key_value_heads": 2,
            "head_dim": hidden // 4,
        }
    if arch == "gemma3":
        kinds = ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(layers)]
        own = {**own, "layer_types": kinds}
    if arch.startswith("gemma"):
        own = {**own, "query_pre_attn_scalar": hidden // 4}
    if arch == "qwen3_moe":
        own = {**own, "moe_intermediate_size": hidden}
    return config_class(**{**common, **sizes, **own, **more})


def make_tiny_model(
    folder: Path,
    arch: str = "llama",
    dtype: str = "float64",
    seed: int = 0,
    max_len: int = 2048,
    hidden: int = 64,
    layers: int = 3,
    vocab: int = BASE_VOCAB,
    **more: Any,
) -> Path:
    """Save a random model with a byte-level tokenizer and a ChatML template.

    The same arguments give the same weights. Nearly all probability is on printable ASCII
    bytes, so that texts are readable and an end-of-sequence token is hardly ever drawn.

    Args:
        folder: Where it goes; made if missing.
        arch: See ``tiny_config``.
        dtype: Of the weights, as torch names it.
        seed: Of the weights.
        max_len: Longest position.
        hidden: Width, a multiple of 4.
        layers: Number of layers.
        vocab: Vocabulary size, at least BASE_VOCAB.
        more: Further settings of the configuration.

    Returns:
        The folder.
    """
    config = tiny_config(arch, hidden, layers, vocab, max_len, **more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                torch.nn.init.normal_(parameter)
        head = torch.zeros_like(model.lm_head.weight)
        # Hidden states have unit scale, so this spreads the logits by about 3.5.
        head[PRINTABLE] = torch.randn(len(PRINTABLE), head.shape[1]) * (3.5 / hidden**0.5)
    with torch.no_grad():
        model.lm_head.weight.copy_(head)
    model.to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(bos_token_id=256, eos_token_id=[257, 259])
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
