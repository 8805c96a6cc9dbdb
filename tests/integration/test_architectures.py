"""Every supported architecture, token for token against transformers' generate in float64."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from tests.integration.models import ARCHITECTURES, make_tiny_model
from tests.integration.running import start_engine

NEW_TOKENS = 20

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{arch: (arch, {}) for arch in ARCHITECTURES},
    # Qwen2 with windows in its upper layers only.
    "qwen2 window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "phi3 partial rotary": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            }
        },
    ),
    # OPT-350m: norms after the blocks, and embeddings narrower than the layers.
    "opt norm after": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 48}),
    "gpt2 layer scale": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2 no scale": ("gpt2", {"scale_attn_weights": False}),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def reference(folder: Path) -> PreTrainedModel:
    # The eager attention is the one that knows caps and sinks. Grouped matrix products of
    # experts know no float64.
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )


def generate(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    # No prompt may hold the padding token: generate would mask it.
    assert 0 not in prompt
    ids = torch.tensor([prompt])
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
    )
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return [int(token) for token in out[0, len(prompt) :]]


@pytest.mark.parametrize("case", CASES)
async def test_tokens_equal_generate(case: str, tmp_path: Path) -> None:
    """Chunked prefill mixed with decodes, prefix hits and preemption change no token."""
    arch, more = CASES[case]
    folder = make_tiny_model(tmp_path, arch, max_len=256, **more)
    # Too small a pool for all six: some are preempted.
    running = start_engine(folder, num_blocks=40, max_num_batched_tokens=24, max_num_seqs=6)
    try:
        kv = running.executor.kv
        assert kv is not None
        # NaN in every block: what a sequence has not written must not reach it.
        kv.write(0, 0, b"\xff" * (kv.block_bytes * running.executor.num_blocks))
        rng = random.Random(5)
        shared = [rng.randrange(10, 200) for _ in range(21)]
        prompts = {
            f"r{index}": (shared if index % 2 else []) + [rng.randrange(10, 200) for _ in range(11)]
            for index in range(6)
        }
        mixed = 0
        launch = running.executor.launch

        def counted(batch: Any, done: Any) -> None:
            nonlocal mixed
            mixed += 0 < batch.num_decodes < len(batch.context_lens)
            launch(batch, done)

        running.executor.launch = counted  # type: ignore[method-assign]
        for name, prompt in prompts.items():
            running.submit(name, prompt, NEW_TOKENS)
        sequences = list(running.engine.scheduler.sequences.values())
        await running.done()
    finally:
        running.close()
    assert mixed > 0
    assert sum(sequence.num_preemptions for sequence in sequences) > 0
    assert any(sequence.num_cached > 0 for sequence in sequences)
    model = reference(folder)
    for name, prompt in prompts.items():
        assert running.tokens[name] == generate(model, prompt), name
