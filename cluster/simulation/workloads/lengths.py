"""How long prompts and outputs are: distributions in tokens.

The power laws and the quantiles are those of "Llumnix: Dynamic Scheduling for Large Language
Model Serving" (OSDI 2024), table 1, and of its published generator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Lengths = Callable[[Generator, int], Ints]
"""Draws so many lengths, each at least 1."""


def fixed(length: int) -> Lengths:
    """Always the same."""
    return lambda rng, count: np.full(count, length, dtype=np.int64)


def uniform(low: int, high: int) -> Lengths:
    """Any from ``low`` to ``high``, both included."""
    return lambda rng, count: rng.integers(low, high, count, endpoint=True)


def power_law(mean: int, alpha: float, cap: int = 6144) -> Lengths:
    """Llumnix's generator: ranks 1 to 2 * mean - 1 with probability proportional to
    rank**-alpha, scaled to the mean, rounded up and cut off at ``cap``."""
    ranks = np.arange(1, 2 * mean, dtype=np.int64)
    weights = ranks.astype(np.float64) ** -alpha
    weights /= weights.sum()

    def draw(rng: Generator, count: int) -> Ints:
        drawn = rng.choice(ranks, size=count, p=weights)
        factor = mean / drawn.mean() if count else 1.0
        scaled: Ints = np.ceil(np.clip(drawn * factor, 1, cap)).astype(np.int64)
        return scaled

    return draw


def weighted(values: Sequence[int], weights: Sequence[float]) -> Lengths:
    """Each value with a probability proportional to its weight."""
    chosen = np.maximum(np.asarray(values, dtype=np.int64), 1)
    shares = np.asarray(weights, dtype=np.float64)
    shares = shares / shares.sum()
    return lambda rng, count: rng.choice(chosen, size=count, p=shares)


def quantiles(levels: Sequence[float], values: Sequence[float], mean: float) -> Lengths:
    """A distribution with these quantiles and this mean.

    Between two quantiles the logarithm grows evenly; below the first one the values bend from
    1 up to it so that the mean is met, as near as that goes.

    Args:
        levels: Probabilities, increasing, in (0, 1).
        values: Lengths there, increasing, at least 1.
        mean: Mean length.
    """
    top = 1.2 * values[-1]
    xs = np.array([levels[0], *levels[1:], 1.0])
    logs = np.log([*values, top])
    grid = (np.arange(20_000) + 0.5) / 20_000
    above = np.exp(np.interp(grid[grid >= levels[0]], xs, logs)).sum()
    below = grid[grid < levels[0]] / levels[0]
    wanted = mean * len(grid) - above

    def bent(at: NDArray[np.float64], bend: float) -> NDArray[np.float64]:
        curve: NDArray[np.float64] = 1.0 + (values[0] - 1.0) * at**bend
        return curve

    low, high = 0.02, 50.0
    for _ in range(60):
        bend = (low * high) ** 0.5
        if bent(below, bend).sum() > wanted:
            low = bend
        else:
            high = bend

    def draw(rng: Generator, count: int) -> Ints:
        at = rng.random(count)
        lengths = np.exp(np.interp(at, xs, logs))
        small = at < levels[0]
        lengths[small] = bent(at[small] / levels[0], low)
        return np.maximum(np.rint(lengths), 1).astype(np.int64)

    return draw


_LEVELS = (0.50, 0.80, 0.95, 0.99)

POWER_LAWS: dict[str, tuple[int, float]] = {"s": (128, 2.0), "m": (256, 1.5), "l": (512, 1.15)}
"""Mean and exponent of Llumnix's short, medium and long lengths."""

DATASETS: dict[str, tuple[Lengths, Lengths]] = {
    "sharegpt": (
        quantiles(_LEVELS, (74, 348, 1484, 3388), 306),
        quantiles(_LEVELS, (487, 781, 988, 1234), 500),
    ),
    "burstgpt": (
        quantiles(_LEVELS, (582, 1427, 2345, 3549), 830),
        quantiles(_LEVELS, (243, 434, 669, 964), 271),
    ),
}
"""Prompt and output lengths like those of a data set, from its published quantiles."""
