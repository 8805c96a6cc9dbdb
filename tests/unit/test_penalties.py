"""Penalties, bias and log-probabilities against transformers' and torch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from instance.executor import StepBatch
from instance.model.logprobs import RawLogprobs
from instance.model.penalties import adjust
from instance.model.sampler import BLOCK, sample
from instance.request import Request, Row, SamplingParams, Sequence, StepPlan
from instance.token_counts import TokenCounts

VOCAB = 5 * BLOCK + 20
BLOCK = 16

tokens = st.lists(st.integers(0, VOCAB - 1) | st.integers(0, 5), min_size=1, max_size=150)
PENALTIES = st.sampled_from([-2.0, -0.5, 0.0, 0.3, 2.0])
penalizing = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.8]),
    top_p=st.sampled_from([1.0, 0.9]),
    seed=st.integers(0, 1 << 40),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3, 5.0]),
    presence_penalty=PENALTIES,
    frequency_penalty=PENALTIES,
    logit_bias=st.dictionaries(st.integers(0, VOCAB + 9), st.floats(-100, 100), max_size=5).map(
        lambda bias: tuple(bias.items())
    ),
)


def sequence_of(prompt: list[int], output: list[int], params: SamplingParams) -> Sequence:
    request = Request("r", tuple(prompt), params)
    sequence = Sequence.start(request, emitted=tuple(output))
    sequence.block_table = list(range(1, 2 + len(sequence.tokens) // BLOCK))
    return sequence


def batch_of(*sequences: Sequence) -> StepBatch:
    """The step that draws the next token of each."""
    rows = [Row(one, len(one.tokens) - 1, 1, True) for one in sequences]
    return StepBatch.build(StepPlan(1, rows), BLOCK)


def logits_of(seed: int, rows: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(rows, VOCAB, generator=generator, dtype=torch.float64)).to(dtype)


def adjusted_naively(
    logits: torch.Tensor, prompt: list[int], output: list[int], params: SamplingParams
) -> torch.Tensor:
    """One row of logits, by the definitions."""
    row = logits.clone()
    for token, bias in params.logit_bias:
        if token < len(row):
            row[token] += bias
    processor = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
    row = processor(torch.tensor([[*prompt, *output]]), row[None])[0]
    for token in set(output):
        row[token] -= params.frequency_penalty * torch.tensor(output.count(token), dtype=row.dtype)
        row[token] -= params.presence_penalty
    return row


@settings(max_examples=200)
@given(tokens, tokens | st.just([]), penalizing, st.integers(0, 1000))
def test_adjusted_logits_are_exact(
    prompt: list[int], output: list[int], params: SamplingParams, seed: int
) -> None:
    for dtype in (torch.float64, torch.float32):
        logits = logits_of(seed, dtype=dtype)
        expected = adjusted_naively(logits[0], prompt, output, params)
        found = adjust(logits, batch_of(sequence_of(prompt, output, params)))[0]
        assert torch.equal(found, expected)


@settings(max_examples=100)
@given(tokens, tokens | st.just([]), penalizing, st.integers(0, 1000))
def test_the_draw_is_that_of_adjusted_logits(
    prompt: list[int], output: list[int], params: SamplingParams, seed: int
) -> None:
    """Also where penalties bring a token among the candidates that was not."""
    logits = logits_of(seed)
    plain = SamplingParams(temperature=params.temperature, top_p=params.top_p, seed=params.seed)
    expected = sample(
        adjusted_naively(logits[0], prompt, output, params)[None],
        batch_of(sequence_of(prompt, output, plain)),
    )
    found = sample(logits, batch_of(sequence_of(prompt, output, params)))
    assert found.tolist() == expected.tolist()


@settings(max_examples=50)
@given(st.lists(st.tuples(tokens, tokens, penalizing), min_size=2, max_size=5))
def test_rows_do_not_touch_each_other(
    rows: list[tuple[list[int], list[int], SamplingParams]],
) -> None:
    sequences = [sequence_of(*row) for row in rows]
    sequences.append(sequence_of([1, 2], [3], SamplingParams(temperature=0)))
    logits = logits_of(3, len(sequences))
    together = adjust(logits.clone(), batch_of(*sequences))
    for i, one in enumerate(sequences):
        assert torch.equal(together[i], adjust(logits[i : i + 1].clone(), batch_of(one))[0])
    assert torch.equal(together[-1], logits[-1])


def test_low_precision_is_adjusted_in_single() -> None:
    params = SamplingParams(frequency_penalty=0.001)
    logits = logits_of(1, dtype=torch.bfloat16)
    found = adjust(logits, batch_of(sequence_of([1], [5, 5, 5], params)))
    assert found.dtype == torch.float32
    assert found[0, 5] == logits[0, 5].float() - np.float32(0.003)
    plain = batch_of(sequence_of([1], [5], SamplingParams()))
    assert adjust(logits, plain) is logits
    assert plain.token_counts == {}


@given(tokens, st.integers(0, 150), st.lists(st.integers(0, 40), max_size=5))
def test_counts_grow_with_the_sequence(known: list[int], num_prompt: int, cuts: list[int]) -> None:
    """Told token by token or at once, the counts are the same, and snapshots stay."""
    counts = TokenCounts(num_prompt)
    kept = []
    for end in sorted({*(min(cut, len(known)) for cut in cuts), len(known)}):
        counts.extend(known[:end])
        kept.append((end, counts.snapshot()))
    for end, (ids, outputs) in kept:
        assert sorted(ids.tolist()) == sorted(set(known[:end]))
        output = known[num_prompt:end]
        assert [output.count(token) for token in ids.tolist()] == outputs.tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_the_raw_logits(dtype: torch.dtype) -> None:
    """Penalties, temperature and truncation do not show, and only rows that ask pay."""
    asked = [None, 0, 3, None, 20]
    sequences = [
        sequence_of(
            [1, 2],
            [7, 7],
            SamplingParams(
                temperature=0.7, top_k=5, presence_penalty=1.5, seed=i, logprobs=count,
                logit_bias=((4, 100.0),) if i == 4 else (),
            ),
        )
        for i, count in enumerate(asked)
    ]  # fmt: skip
    batch = batch_of(*sequences)
    logits = logits_of(9, len(asked), dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = logits.log_softmax(-1, dtype=wide).float()
    raw = RawLogprobs(logits, batch)
    drawn = sample(logits, batch)
    found = raw.of(drawn)
    assert drawn[4] == 4
    assert sorted(found) == [1, 2, 4]
    for row, one in found.items():
        assert one.logprob == expected[row, drawn[row]]
        order = expected[row].argsort(descending=True, stable=True)[: asked[row]]
        assert one.top_logprobs == tuple(expected[row, order].tolist())
        assert expected[row, list(one.top_ids)].tolist() == list(one.top_logprobs)
        assert len(set(one.top_ids)) == asked[row]


def test_more_logprobs_than_tokens() -> None:
    batch = batch_of(sequence_of([0], [], SamplingParams(logprobs=20)))
    found = RawLogprobs(torch.zeros(1, 3), batch).of(np.array([2]))[0]
    assert sorted(found.top_ids) == [0, 1, 2]
    assert len(found.top_logprobs) == 3
