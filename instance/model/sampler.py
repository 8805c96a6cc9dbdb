"""Stateless sampling: the draw for position i depends on (logits, tokens so far, seed, i) only.

A token is drawn as the winner of an exponential race (the Gumbel-max trick): each candidate
gets an exponential variate that is a function of (seed, position, token id), divided by its
probability, and the least one wins. Nothing depends on the other rows of the batch, and a
rounding error in the logits changes the winner only where two candidates nearly tie, which
drawing from a cumulative sum does not give.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from instance.executor import Ints, StepBatch
from instance.model.noise import exponentials, lower_bounds, position_key
from instance.model.penalties import adjust
from instance.request import SamplingParams

GREEDY_BELOW = 1e-5
"""Temperatures below this count as greedy."""
BLOCK = 64
"""Tokens of which only the likeliest counts when a bound for top-k is sought."""
STRIDE = 16
"""One token of so many is looked at to guess which are light."""

Floats = NDArray[np.float64]
Row = NDArray[np.floating]
"""[V] logits of a row, in single or double precision."""


def sample(logits: Tensor, batch: StepBatch) -> Ints:
    """Draw one token per row.

    Bias and penalties come first, then temperature, then min-p, top-k and top-p, each on what
    is left. Equal logits are ordered by token id. Logits are changed in place, those of
    tokens that may not be drawn yet (``min_tokens``) to -inf.

    Args:
        logits: [S, V], of any float dtype.
        batch: Its ``sampling``, ``sample_positions``, ``num_outputs``, ``stop_token_ids``
            and ``token_counts`` give the S rows.

    Returns:
        [S] token ids.
    """
    logits = adjusted(logits, batch)
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    values = logits.cpu().numpy()
    rows = [i for i, params in enumerate(batch.sampling) if params.temperature >= GREEDY_BELOW]
    if len(rows) < len(batch.sampling):
        tokens: Ints = values.argmax(axis=-1)
    else:
        tokens = np.empty(len(rows), dtype=np.int64)
    for i in rows:
        params = batch.sampling[i]
        key = np.uint64(position_key(params.seed, int(batch.sample_positions[i])))
        tokens[i] = _draw(values[i], params, key)
    return tokens


def adjusted(logits: Tensor, batch: StepBatch) -> Tensor:
    """Logits after bias and penalties, with -inf for what may not be drawn yet.

    Args:
        logits: [S, V]; may be changed in place.
        batch: As for ``sample``.
    """
    logits = adjust(logits, batch)
    for i, params in enumerate(batch.sampling):
        # What a grammar allows takes them into account.
        if batch.num_outputs[i] < params.min_tokens and i not in batch.grammars:
            ids = [token for token in batch.stop_token_ids[i] if 0 <= token < logits.shape[1]]
            logits[i, ids] = -torch.inf
    return logits


def needs_adjusting(batch: StepBatch) -> bool:
    """Some row has a bias, penalties, or tokens that may not be drawn yet."""
    return any(
        params.logit_bias or params.penalizes or count < params.min_tokens
        for params, count in zip(batch.sampling, batch.num_outputs, strict=True)
    )


def _draw(row: Row, params: SamplingParams, key: np.uint64) -> int:
    highest = row.max()
    if not np.isfinite(highest):
        return int(row.argmax())
    if params.top_p >= 1 and params.top_k <= 0 and params.min_p <= 0:
        ids = _contenders(row, highest, params.temperature, key)
        return _race(ids, row[ids].astype(np.float64), params.temperature, key)
    ids, total = _candidates(row, highest, params)
    values = row[ids].astype(np.float64)
    # Sorting values alone is several times faster than sorting ids by them.
    descending = -np.sort(-values)
    kept = _highest(values, descending, _survivors(descending, params, total))
    return _race(ids[kept], values[kept], params.temperature, key)


def _highest(values: Floats, descending: Floats, count: int) -> Ints:
    """Indices of the ``count`` highest values, rising; among equals the first ones count."""
    least = descending[count - 1]
    kept: Ints = np.flatnonzero(values >= least)
    if len(kept) > count:
        last = np.flatnonzero(values[kept] == least)
        kept = np.delete(kept, last[count - len(kept) :])
    return kept


def _race(ids: Ints, values: Floats, temperature: float, key: np.uint64) -> int:
    # Far from the maximum the factor overflows to inf: such a token does not win.
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.exp((values.max() - values) / temperature)
    scaled *= exponentials(key, ids)
    return int(ids[scaled.argmin()])


def _contenders(row: Row, highest: np.floating, temperature: float, key: np.uint64) -> Ints:
    """Tokens of the whole vocabulary that can win: those whose bound beats one's result."""
    with np.errstate(over="ignore"):
        bounds = np.exp((highest - row) * row.dtype.type(1 / temperature))
        bounds *= lower_bounds(key, len(row))
        first = int(bounds.argmin())
        factor = np.exp((float(highest) - float(row[first])) / temperature)
    result = factor * exponentials(key, np.array([first]))[0]
    # Single precision is off by a few millionths here.
    return np.flatnonzero(bounds <= result * 1.001)


def _candidates(
    row: Row, highest: np.floating, params: SamplingParams
) -> tuple[Ints, float | None]:
    """Token ids, rising, that hold all that the parameters keep and not many more.

    Returns:
        The ids, and the mass of the whole vocabulary relative to the likeliest token where
        top-p counts from it, else None.
    """
    if params.top_k > 0:
        return np.flatnonzero(row >= _at_most_kth(row, params.top_k)), None
    weights = np.exp((row - highest) * row.dtype.type(1 / params.temperature))
    # Single precision is off by a few millionths here.
    if params.min_p > 0:
        return np.flatnonzero(weights >= params.min_p * 0.99), None
    total = float(weights.sum(dtype=np.float64))
    left_out = (0.99 * (1 - params.top_p) - 1e-6) * total
    ids = np.flatnonzero(weights >= _light(weights, 0.8 * left_out))
    if total - float(weights[ids].sum(dtype=np.float64)) <= left_out:
        return ids, total
    # Tokens that together weigh less than what the nucleus leaves out are not in it.
    ids = np.flatnonzero(weights >= left_out / len(row))
    for _ in range(3):
        heavy = weights[ids]
        lighter = total - float(heavy.sum(dtype=np.float64))
        ids = ids[heavy >= (left_out - lighter) / len(ids)]
    return ids, total


def _light(weights: Row, mass: float) -> np.floating:
    """A guess at the weight below which all tokens together weigh about ``mass``.

    Light tokens are many, so that few of them tell what all weigh.
    """
    rising = np.sort(weights[::STRIDE])
    sums = np.cumsum(rising, dtype=np.float64)
    found = int(np.searchsorted(sums, mass / STRIDE))
    bound: np.floating = rising[min(found, len(rising) - 1)]
    return bound


def _at_most_kth(row: Row, k: int) -> np.floating:
    """A value that at least ``k`` logits reach, seldom far below the ``k``-th largest."""
    size = len(row)
    blocks = size // BLOCK
    if k > blocks:
        return row.min() if k >= size else np.partition(row, size - k)[size - k]
    highest = row[: blocks * BLOCK].reshape(blocks, BLOCK).max(axis=1)
    bound: np.floating = np.partition(highest, blocks - k)[blocks - k]
    return bound


def _survivors(values: Floats, params: SamplingParams, total: float | None) -> int:
    """How many of the leading ``values`` (descending) min-p, top-k and top-p keep.

    Args:
        values: Logits in descending order.
        params: The limits.
        total: Mass that top-p is a share of, relative to the likeliest token; None means
            that of what min-p and top-k leave.
    """
    weights: Floats = np.exp((values - values[0]) / params.temperature)
    kept = len(values)
    if params.min_p > 0:
        kept = int(np.searchsorted(-weights, -params.min_p, side="right"))
    if params.top_k > 0:
        kept = min(kept, params.top_k)
    if params.top_p < 1:
        mass: Floats = np.cumsum(weights[:kept])
        whole = mass[-1] if total is None else total
        # A token stays while the mass before it is below top_p.
        kept = 1 + int(np.searchsorted(mass[:-1], params.top_p * whole, side="left"))
    return max(1, kept)
