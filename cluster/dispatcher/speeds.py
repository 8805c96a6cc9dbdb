"""How fast instances are relative to each other, as far as measurements tell them apart.

Every instance learns by itself what its steps cost, so equal instances learn different
figures. A figure counts as far as the differences between instances exceed its own
uncertainty: each is drawn towards the common one by the ratio of the two variances (the
James-Stein estimator, with the variance between instances by the method of moments).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from instance.budget import StepCosts, StepShape, attended

REFERENCE = StepShape(
    prefill=256, prefill_context=attended(0, 256), decodes=16, decode_context=16 * 512
)
"""A step as most instances know it: what it takes is better known than any cost by itself."""
ALIKE, MOST = 1.25, 8.0
"""Factors of speed: those within the first count as equally fast, and none counts for more
than the second."""
PROMPT_PACE = 2e-4
"""Seconds per position of a prompt before any was measured."""
_DOUBT = math.log(2.0) ** 2
"""Variance of the logarithm of a single figure, before anything is known of how it varies."""
_RECENT = 1 / 64
"""Weight of a new figure among many."""


@dataclass(slots=True)
class _Figure:
    """Of the logarithms of an instance's figures: recent mean, variance, and their number."""

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    def observe(self, value: float) -> None:
        self.count += 1
        weight = max(1 / self.count, _RECENT)
        off = value - self.mean
        self.mean += weight * off
        self.variance = (1 - weight) * (self.variance + weight * off * off)

    @property
    def uncertainty(self) -> float:
        """Variance of the mean: figures in a row are hardly independent, so not divided."""
        return self.variance + _DOUBT / self.count


class Speeds:
    """Speeds of instances, which are known by numbers."""

    def __init__(self) -> None:
        self._figures: dict[int, _Figure] = {}
        self._last: dict[int, StepCosts] = {}

    def observe(self, number: int, costs: StepCosts | None) -> bool:
        """An instance reported what its steps cost; false if that was known already."""
        if costs is None or costs == self._last.get(number):
            return False
        seconds = costs.seconds(REFERENCE)
        if not 0.0 < seconds < math.inf:
            return False
        self._last[number] = costs
        self._figures.setdefault(number, _Figure()).observe(math.log(seconds))
        return True

    def forget(self, number: int) -> None:
        """An instance is gone, or started anew."""
        self._figures.pop(number, None)
        self._last.pop(number, None)

    def prompt_pace(self) -> float:
        """Seconds that a position of a prompt adds to a step: the median of what is known."""
        paces = [one.prefill for one in self._last.values() if one.prefill > 0]
        return statistics.median(paces) if paces else PROMPT_PACE

    def relative(self) -> Mapping[int, float]:
        """By instance its speed over the median one's; those not named are not told apart."""
        figures = self._figures
        if len(figures) < 2:
            return {}
        means = sorted(one.mean for one in figures.values())
        half = len(means) // 2
        centre = (means[half] + means[-half - 1]) / 2
        spread = sum((mean - centre) ** 2 for mean in means) / len(means)
        noise = sum(one.uncertainty for one in figures.values()) / len(means)
        between = max(0.0, spread - noise)
        found = {}
        for number, one in figures.items():
            share = between / (between + one.uncertainty) if between else 0.0
            speed = math.exp(share * (centre - one.mean))
            if not 1 / ALIKE < speed < ALIKE:
                found[number] = min(MOST, max(1 / MOST, speed))
        return found
