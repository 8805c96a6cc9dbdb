"""When requests come: arrival times in seconds, in order."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def renewal(rng: Generator, rate: float, cv: float, count: int) -> Floats:
    """``count`` arrivals with independent Gamma intervals.

    Args:
        rng: Source of chance.
        rate: Arrivals per second, above 0.
        cv: Standard deviation of the intervals over their mean, above 0; 1 is a Poisson
            process, more is burstier.
        count: How many.
    """
    shape = 1.0 / cv**2
    return np.cumsum(rng.gamma(shape, 1.0 / (rate * shape), count))


def renewal_until(rng: Generator, rate: float, cv: float, duration: float) -> Floats:
    """All arrivals of a renewal process before ``duration`` seconds; none where rate is 0."""
    if rate <= 0:
        return np.empty(0)
    return _until(lambda count: renewal(rng, rate, cv, count), rate * duration, duration)


def weibull_until(rng: Generator, shape: float, scale: float, duration: float) -> Floats:
    """All arrivals before ``duration`` with independent Weibull intervals."""
    mean = scale * math.gamma(1.0 + 1.0 / shape)
    return _until(
        lambda count: np.cumsum(scale * rng.weibull(shape, count)), duration / mean, duration
    )


def _until(draw: Callable[[int], Floats], expected: float, duration: float) -> Floats:
    parts, reached = [np.empty(0)], 0.0
    while reached < duration:
        part = reached + draw(int(expected) + 16)
        parts.append(part)
        reached = float(part[-1])
    times: Floats = np.concatenate(parts)
    return times[times < duration]


def ramp(rng: Generator, first: float, last: float, cv: float, duration: float) -> Floats:
    """Arrivals whose rate goes linearly from ``first`` to ``last`` over ``duration``.

    A process of rate 1 is stretched by the inverse of the expected count, so burstiness
    is that of ``cv`` at every rate.
    """
    expected = 0.5 * (first + last) * duration
    unit = renewal_until(rng, 1.0, cv, expected)
    growth = (last - first) / duration
    if abs(growth) < 1e-12:
        return unit / first
    return (np.sqrt(first**2 + 2.0 * growth * unit) - first) / growth


def switched(times: Floats, on: float, off: float) -> Floats:
    """Let time stand still between bursts: ``on`` seconds of ``times``, then ``off`` of none."""
    return times + np.floor(times / on) * off
