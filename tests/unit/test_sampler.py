"""Sampling: exact truncation, the right distribution, and nothing but (logits, seed, i)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instance.executor import StepBatch
from instance.model.noise import exponentials, mix64, position_key
from instance.model.sampler import BLOCK, _highest, sample
from instance.request import SamplingParams

VOCAB = 700
"""Some blocks of the search for top-k, and a rest."""
LARGE_VOCAB = 10_000


def batch_of(
    params: list[SamplingParams],
    positions: list[int] | None = None,
    outputs: list[int] | None = None,
    stop: list[frozenset[int]] | None = None,
) -> StepBatch:
    """A batch of which only what the sampler reads means anything."""
    count = len(params)
    none = np.zeros(0, dtype=np.int64)
    return StepBatch(
        number=0,
        token_ids=none,
        positions=none,
        slots=none,
        query_starts=none,
        context_lens=none,
        block_tables=np.zeros((0, 1), dtype=np.int64),
        num_decodes=0,
        sample_rows=np.arange(count),
        sample_positions=np.array(positions or [0] * count, dtype=np.int64),
        num_outputs=np.array(outputs or [0] * count, dtype=np.int64),
        sampling=params,
        stop_token_ids=stop or [frozenset()] * count,
    )


def draw(logits: torch.Tensor, params: SamplingParams, positions: int) -> np.ndarray:
    """Draws of one row of logits at positions 0, 1, ..."""
    rows = logits.expand(positions, -1).clone()
    return sample(rows, batch_of([params] * positions, list(range(positions))))


def kept_naively(logits: list[float], params: SamplingParams) -> dict[int, float]:
    """What temperature, min-p, top-k and top-p leave, by the definitions; id to probability."""
    top = max(logits)
    weights = {i: math.exp((value - top) / params.temperature) for i, value in enumerate(logits)}
    kept = {i: w for i, w in weights.items() if w >= params.min_p}
    order = sorted(kept, key=lambda i: (-logits[i], i))
    if params.top_k > 0:
        order = order[: params.top_k]
    total = math.fsum(weights[i] for i in order)
    chosen, mass = [], 0.0
    for i in order:
        if chosen and params.top_p < 1 and mass >= params.top_p * total:
            break
        chosen.append(i)
        mass += weights[i]
    total = math.fsum(weights[i] for i in chosen)
    return {i: weights[i] / total for i in chosen}


def race_naively(probabilities: dict[int, float], seed: int, position: int) -> int:
    """The winner of the exponential race, with the noise computed in plain integers."""

    def finish(token: int) -> float:
        key = position_key(seed, position)
        bits = mix64(key + (token + 1) * 0x9E3779B97F4A7C15)
        return -math.log(((bits >> 12) + 0.5) * 2.0**-52) / probabilities[token]

    return min((i for i, p in probabilities.items() if p > 0), key=finish)


TEMPERATURES = st.sampled_from([0.3, 1.0, 2.5])
TOP_P = st.sampled_from([0.999, 0.9, 0.5, 0.01])
TOP_K = st.sampled_from([1, 5, VOCAB // BLOCK, VOCAB // BLOCK + 1, 100, 5000, 9000])
MIN_P = st.sampled_from([1e-6, 0.01, 0.3, 1.0])
SEEDS = st.integers(0, 2**64 - 1)
# One limit alone is what leaves many tokens.
sampling_params = st.one_of(
    st.builds(SamplingParams, temperature=st.just(0.0), top_p=TOP_P, top_k=TOP_K),
    st.builds(SamplingParams, temperature=TEMPERATURES, seed=SEEDS),
    st.builds(SamplingParams, temperature=TEMPERATURES, seed=SEEDS, top_p=TOP_P),
    st.builds(SamplingParams, temperature=TEMPERATURES, seed=SEEDS, top_k=TOP_K),
    st.builds(SamplingParams, temperature=TEMPERATURES, seed=SEEDS, min_p=MIN_P),
    st.builds(
        SamplingParams, temperature=TEMPERATURES, seed=SEEDS, top_p=TOP_P, top_k=TOP_K, min_p=MIN_P
    ),
)


@st.composite
def logits_rows(draw: st.DrawFn) -> torch.Tensor:
    """A row of logits: peaked or flat, rounded to make ties or not."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    scale = draw(st.sampled_from([0.01, 1.0, 4.0, 30.0]))
    size = draw(st.sampled_from([1, 2, 40, BLOCK, VOCAB, LARGE_VOCAB]))
    row = torch.randn(size, generator=generator, dtype=torch.float64) * scale
    return row.round() if draw(st.booleans()) else row


@settings(max_examples=300, deadline=None)
@given(logits_rows(), sampling_params, st.integers(0, 1 << 20))
def test_draws_what_the_definitions_say(
    row: torch.Tensor, params: SamplingParams, position: int
) -> None:
    found = int(sample(row[None].clone(), batch_of([params], [position]))[0])
    values = row.tolist()
    if params.temperature == 0:
        assert found == values.index(max(values))
        return
    kept = kept_naively(values, params)
    assert found in kept
    assert found == race_naively(kept, params.seed, position)


@pytest.mark.parametrize("size", [40, VOCAB, LARGE_VOCAB])
@pytest.mark.parametrize("top_p", [0.95, 0.6, 0.2])
@pytest.mark.parametrize("flat", [True, False])
def test_nucleus(size: int, top_p: float, flat: bool) -> None:
    """Nuclei that end among the likeliest few, and far beyond them."""
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(size, generator=generator, dtype=torch.float64) * (0.02 if flat else 4.0)
    params = SamplingParams(top_p=top_p, seed=1)
    kept = kept_naively(logits.tolist(), params)
    found = draw(logits, params, 20)
    assert found.tolist() == [race_naively(kept, 1, position) for position in range(20)]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_among_equals_the_first_are_kept(numbers: list[int], data: st.DataObject) -> None:
    values = np.array(numbers, dtype=np.float64)
    count = data.draw(st.integers(1, len(numbers)))
    order = np.argsort(-values, kind="stable")
    found = _highest(values, values[order], count)
    assert found.tolist() == sorted(order[:count])


def test_limits_at_their_borders() -> None:
    """A token belongs to the nucleus while the mass before it is below top_p; of equals the
    lower ids come first."""
    for params, kept in (
        (SamplingParams(top_p=0.5), {0, 1}),
        (SamplingParams(top_p=0.51), {0, 1, 2}),
        (SamplingParams(top_k=3), {0, 1, 2}),
        (SamplingParams(min_p=1.0), {0, 1, 2, 3}),
    ):
        assert set(draw(torch.zeros(4), params, 200).tolist()) == kept
        wide = torch.full((VOCAB,), -torch.inf)
        wide[:4] = 0
        assert set(draw(wide, params, 200).tolist()) == kept


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(sampling_params, st.integers(0, 5000)), min_size=1, max_size=9),
    st.integers(0, 10_000),
    st.randoms(use_true_random=False),
)
def test_does_not_depend_on_the_batch(
    rows: list[tuple[SamplingParams, int]], data_seed: int, shuffle: object
) -> None:
    generator = torch.Generator().manual_seed(data_seed)
    logits = torch.randn(len(rows), VOCAB, generator=generator) * 3
    order = list(range(len(rows)))
    shuffle.shuffle(order)  # type: ignore[attr-defined]
    together = sample(
        logits[order].clone(),
        batch_of([rows[i][0] for i in order], [rows[i][1] for i in order]),
    )
    for place, i in enumerate(order):
        alone = sample(logits[i : i + 1].clone(), batch_of([rows[i][0]], [rows[i][1]]))
        assert alone[0] == together[place]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.7, seed=2),
        SamplingParams(temperature=1.5, top_k=6, seed=3),
        SamplingParams(temperature=1.0, top_p=0.8, seed=4),
        SamplingParams(temperature=1.0, min_p=0.2, seed=5),
        SamplingParams(temperature=1.2, min_p=0.05, top_k=9, top_p=0.9, seed=6),
    ],
)
def test_distribution(params: SamplingParams) -> None:
    """Chi-square against the exact probabilities, over the positions of fixed seeds."""
    logits = torch.linspace(2.0, -1.0, 12)
    draws = 4000
    counts = np.bincount(draw(logits, params, draws), minlength=12)
    kept = kept_naively(logits.tolist(), params)
    assert set(np.flatnonzero(counts)) <= set(kept)
    statistic = sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in kept.items())
    freedom = len(kept) - 1
    # Five standard deviations above the mean of a chi-square.
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_seeds_and_positions_are_independent() -> None:
    """Equal draws of two streams are as frequent as chance has it."""
    logits, draws = torch.zeros(10), 4000
    streams = [draw(logits, SamplingParams(seed=seed), draws) for seed in (0, 1, 2, 1 << 63)]
    for index, one in enumerate(streams):
        pairs = [np.mean(one == other) for other in streams[:index]]
        pairs.append(np.mean(one[1:] == one[:-1]))
        assert all(abs(share - 0.1) < 0.025 for share in pairs)


def test_exponentials_are_standard() -> None:
    noise = exponentials(np.uint64(position_key(3, 7)), np.arange(200_000))
    assert noise.min() > 0
    assert abs(noise.mean() - 1) < 0.02
    assert abs(noise.var() - 1) < 0.05


def test_rounding_errors_do_not_change_the_draw() -> None:
    """Noise of 1e-5 in the logits changes next to no draw of many."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, VOCAB, generator=generator, dtype=torch.float64) * 3
    noisy = logits + 1e-5 * torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    params = [SamplingParams(temperature=1.0, top_p=0.95, seed=9)] * 2000
    positions = list(range(2000))
    one = sample(logits, batch_of(params, positions))
    other = sample(noisy, batch_of(params, positions))
    assert np.count_nonzero(one != other) <= 2


@settings(max_examples=60, deadline=None)
@given(sampling_params, st.integers(0, 3))
def test_stop_tokens_wait_for_min_tokens(params: SamplingParams, outputs: int) -> None:
    """The likeliest tokens are stop tokens; ids outside of the vocabulary do no harm."""
    logits = torch.zeros(1, 20)
    logits[0, :5] = 50.0
    limited = replace(params, min_tokens=2)
    stop = frozenset({0, 1, 2, 3, 4, 999})
    batch = batch_of([limited], outputs=[outputs], stop=[stop])
    assert (int(sample(logits, batch)[0]) in stop) == (outputs >= 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1)).to(dtype)
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=1),
        SamplingParams(top_p=0.9, seed=1),
    ]
    found = sample(logits.clone(), batch_of(params))
    exact = sample(logits.double(), batch_of(params))
    assert found.tolist() == exact.tolist()


def test_no_rows() -> None:
    assert sample(torch.zeros(0, 10), batch_of([])).tolist() == []
