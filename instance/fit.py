"""Non-negative costs, fitted to measurements as they come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Weight of the prior at all times.
_PRIOR_WEIGHT = 1e-4
_SHORTEST = 1e-7  # seconds; what is shorter cannot be told apart


class Fit:
    """Non-negative costs per unit of a few features, by least squares with forgetting.

    Each measurement counts by its relative error, so that small jobs teach the cost of a
    launch and large ones the rate. Where measurements say nothing, the prior stands.

    Args:
        prior: Costs before the first measurement.
        memory: Weight that older measurements keep at each new one.
    """

    def __init__(self, prior: Sequence[float], memory: float) -> None:
        self.count = 0
        self._prior = np.array(prior, dtype=np.float64)
        self._memory = memory
        # In units of the prior, so that all numbers are of one size.
        self._products = np.zeros((len(prior), len(prior)))
        self._targets = np.zeros(len(prior))
        self._costs: NDArray[np.float64] | None = self._prior

    def observe(self, features: Sequence[float], seconds: float) -> None:
        """A job with these features took so long."""
        seconds = max(seconds, _SHORTEST)
        x = np.array(features, dtype=np.float64) * self._prior / seconds
        self._products = self._memory * self._products + x[:, None] * x
        self._targets = self._memory * self._targets + x
        self._costs = None
        self.count += 1

    @property
    def costs(self) -> NDArray[np.float64]:
        """Seconds per unit of each feature."""
        if self._costs is None:
            self._costs = self._solve() * self._prior
        return self._costs

    def _solve(self) -> NDArray[np.float64]:
        size = len(self._prior)
        # The prior is a faint measurement of every feature, relative to what was seen of it.
        products = self._products.copy()
        diagonal = products.reshape(-1)[:: size + 1]
        weight = _PRIOR_WEIGHT * (1e-6 + diagonal)
        diagonal += weight
        targets = self._targets + weight
        found = np.zeros(size)
        active = list(range(size))
        # Features whose cost came out negative go one by one: their true cost is near 0.
        while active:
            if len(active) < size:
                part = np.linalg.solve(products[np.ix_(active, active)], targets[active])
            else:
                part = np.linalg.solve(products, targets)
            lowest = int(part.argmin())
            if part[lowest] >= 0:
                found[active] = part
                break
            del active[lowest]
        return found

    def seconds(self, features: Sequence[float]) -> float:
        """What a job with these features is expected to take."""
        return float(self.costs @ np.array(features, dtype=np.float64))
