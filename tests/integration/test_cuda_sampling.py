"""Draws on the device beside those of the CPU's sampler."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from instance.executor import StepBatch
from instance.model.sampler import sample
from instance.request import SamplingParams

pytest.importorskip("triton")

from instance.model.cuda import sampling
from instance.model.cuda.sampling import NUM_FIELDS, SamplingFields, draw, write_sampling


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    # So that a vocabulary of two hundred tokens takes several blocks.
    monkeypatch.setattr(sampling, "BLOCK", 128)


def batch_of(params: list[SamplingParams], position: int) -> StepBatch:
    rows = len(params)
    none = np.zeros(rows, dtype=np.int64)
    return StepBatch(
        number=0,
        token_ids=none,
        positions=none,
        slots=none,
        query_starts=np.arange(rows + 1),
        context_lens=none,
        block_tables=none[:, None],
        num_decodes=rows,
        sample_rows=np.arange(rows),
        sample_positions=np.arange(rows) * 7 + position,
        num_outputs=none,
        sampling=params,
        stop_token_ids=[frozenset()] * rows,
    )


def drawn(logits: Tensor, batch: StepBatch) -> list[int]:
    rows = len(logits)
    fields = np.ones((NUM_FIELDS, rows + 2), dtype=np.int64)
    write_sampling(batch, fields)
    tokens = torch.full((rows + 3,), -1)
    padded = torch.cat([logits, torch.zeros_like(logits[:1]).repeat(2, 1)])
    draw(padded, SamplingFields.of(torch.from_numpy(fields)), tokens)
    # Padding is greedy, and nothing is written beyond it.
    assert tokens[rows:].tolist() == [0, 0, -1]
    return tokens[:rows].tolist()


def every_kind() -> list[SamplingParams]:
    seeded = [
        SamplingParams(temperature=0.0),
        SamplingParams(),
        SamplingParams(temperature=0.2),
        SamplingParams(temperature=3.0),
        SamplingParams(top_k=1),
        SamplingParams(top_k=5),
        SamplingParams(top_k=5000),
        SamplingParams(top_p=0.5),
        SamplingParams(top_p=0.95, temperature=0.7),
        SamplingParams(top_p=1e-6),
        SamplingParams(min_p=0.1),
        SamplingParams(min_p=1.0),
        SamplingParams(top_k=20, top_p=0.8),
        SamplingParams(top_k=40, top_p=0.9, min_p=0.02, temperature=1.5),
    ]
    return [dataclasses.replace(one, seed=i * 0x9E3779B9 + 2**63) for i, one in enumerate(seeded)]


@pytest.mark.parametrize(
    ("dtype", "grain"), [(torch.float32, None), (torch.float32, 0.5), (torch.bfloat16, None)]
)
def test_the_same_tokens_as_on_the_cpu(dtype: torch.dtype, grain: float | None) -> None:
    params = every_kind()
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(len(params), 200, generator=generator)
    if grain is not None:
        # Many equal logits, so that the lower id must win.
        logits = (logits / grain).round() * grain
    logits = logits.to(dtype)
    batch = batch_of(params, 50)
    assert drawn(logits, batch) == sample(logits.clone(), batch).tolist()


def test_what_cannot_be_drawn_is_not() -> None:
    logits = torch.full((4, 200), -torch.inf)
    logits[0, 77] = 1.0
    logits[1, [5, 199]] = torch.tensor([3.0, 3.0])
    logits[2] = -1e30
    logits[2, 150] = -1e29
    params = [SamplingParams(seed=i) for i in range(4)]
    batch = batch_of(params, 9)
    found = drawn(logits, batch)
    assert found == sample(logits.clone(), batch).tolist()
    assert found[0] == 77
    assert found[1] in (5, 199)
    assert found[2:] == [150, 0]
