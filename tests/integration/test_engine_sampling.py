"""Penalties and log-probabilities of the running engine against transformers' generate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from instance.request import Sequence
from tests.integration.models import make_tiny_model
from tests.integration.running import start_engine

PROMPTS = [[40 + 3 * index + step % 7 for step in range(5 + 4 * index)] for index in range(4)]
OUTPUT = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "m", "llama")


@pytest.mark.parametrize("penalty", [1.0, 1.4])
async def test_like_generate(folder: Path, penalty: float) -> None:
    """Also with chunked prefill, and where a pool too small preempts and recomputes."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    model.generation_config.eos_token_id = None
    running = start_engine(folder, num_blocks=32, max_num_batched_tokens=8)
    sequences: list[Sequence] = []
    try:
        for index, prompt in enumerate(PROMPTS):
            running.submit(str(index), prompt, OUTPUT, repetition_penalty=penalty, logprobs=3)
            sequences.append(running.engine.scheduler.sequences[str(index)])
        await running.done()
    finally:
        running.close()
    assert any(sequence.num_preemptions for sequence in sequences)
    for prompt, sequence in zip(PROMPTS, sequences, strict=True):
        expected = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=OUTPUT,
            do_sample=False,
            repetition_penalty=penalty,
        )
        assert sequence.tokens == expected[0].tolist()
        with torch.inference_mode():
            raw = model(expected).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        drawn = raw.gather(1, torch.tensor(sequence.output)[:, None])[:, 0].tolist()
        assert [one.logprob for one in sequence.logprobs] == pytest.approx(drawn, rel=1e-6)
        top, ids = raw.topk(3)
        assert [list(one.top_ids) for one in sequence.logprobs] == ids.tolist()
        for one, figures in zip(sequence.logprobs, top.tolist(), strict=True):
            assert one.top_logprobs == pytest.approx(figures, rel=1e-6)
