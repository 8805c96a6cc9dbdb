"""What moving KV and computing it anew cost here, learned from what both took so far."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from instance.request import Row

MIB = 1 << 20

# Before anything is measured: a launch, and a MiB at 2 GiB/s.
_COPY_PRIOR = (2e-5, 1 / 2048)
# Per step, prefill position, 1000 query-key pairs of prefill, decode row, 1000 positions
# that decode rows read. A guess for prefill that is too low would never be mended by trying.
_STEP_PRIOR = (1e-3, 2e-4, 1e-6, 1e-4, 1e-6)

# Weight of an old measurement after each new one, and of the prior at all times.
_COPY_MEMORY, _STEP_MEMORY, _PRIOR_WEIGHT = 0.95, 0.99, 1e-4
_SERVICE_MEMORY = 0.99
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
        self._products = self._memory * self._products + np.outer(x, x)
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
        weight = _PRIOR_WEIGHT * (1e-6 + np.diag(self._products))
        products = self._products + np.diag(weight)
        targets = self._targets + weight
        found = np.zeros(size)
        active = list(range(size))
        # Features whose cost came out negative go one by one: their true cost is near 0.
        while active:
            part = np.linalg.solve(products[np.ix_(active, active)], targets[active])
            lowest = int(np.argmin(part))
            if part[lowest] >= 0:
                found[active] = part
                break
            del active[lowest]
        return found

    def seconds(self, features: Sequence[float]) -> float:
        """What a job with these features is expected to take."""
        return float(self.costs @ np.array(features, dtype=np.float64))


class SwapCost:
    """Predicts copies and prefills of one instance, in seconds and in service.

    Args:
        block_bytes: Bytes of a KV block.
        block_size: Tokens of a KV block.
    """

    def __init__(self, block_bytes: int, block_size: int) -> None:
        self.block_bytes = block_bytes
        self.block_size = block_size
        self._out = Fit(_COPY_PRIOR, _COPY_MEMORY)
        self._in = Fit(_COPY_PRIOR, _COPY_MEMORY)
        self._step = Fit(_STEP_PRIOR, _STEP_MEMORY)
        self._service = 0.0
        self._seconds = 0.0

    # ---- measurements

    def observe_copy(self, outward: bool, runs: int, blocks: int, seconds: float) -> None:
        """A job of so many runs and blocks took so long, without the wait for its turn."""
        fit = self._out if outward else self._in
        fit.observe(self._copy_features(runs, blocks), seconds)

    def observe_step(self, rows: Sequence[Row], seconds: float) -> None:
        """A step with these rows kept the device busy for so long."""
        prefill = pairs = decodes = context = 0
        for _, start, length, _ in rows:
            if length > 1:
                prefill += length
                pairs += length * (2 * start + length) // 2
            else:
                decodes += 1
                context += start + 1
        self._observe(prefill, pairs, decodes, context, seconds)

    def observe_decodes(self, rows: Sequence[Row], seconds: Iterable[float]) -> None:
        """Steps that only decode, one after the other, the first of them with these rows."""
        context = sum(row.start + 1 for row in rows)
        for one in seconds:
            self._observe(0, 0, len(rows), context, one)
            context += len(rows)

    def _observe(
        self, prefill: int, pairs: int, decodes: int, context: int, seconds: float
    ) -> None:
        self._step.observe((1, prefill, pairs / 1000, decodes, context / 1000), seconds)
        self._service = _SERVICE_MEMORY * self._service + prefill + 2 * decodes
        self._seconds = _SERVICE_MEMORY * self._seconds + seconds

    # ---- predictions

    def copy_seconds(self, outward: bool, runs: int, blocks: int) -> float:
        """Seconds that a copy of ``blocks`` blocks in ``runs`` runs takes."""
        return self._copies(outward).seconds(self._copy_features(runs, blocks)) if blocks else 0.0

    def prefill_seconds(self, start: int, end: int) -> float:
        """Seconds that positions [start, end) add to the steps which compute them."""
        pairs = (end - start) * (start + end) / 2
        return self._step.seconds((0, end - start, pairs / 1000, 0, 0))

    @property
    def service_rate(self) -> float:
        """Units of service (prompt tokens, and twice output tokens) per second of steps."""
        return self._service / self._seconds if self._seconds else 0.0

    def swap_service(self, num_tokens: int) -> float:
        """Service that the instance could give in the time that KV of so many tokens takes
        to leave in one run and return, in units of service; 0 before the first step."""
        blocks = -(-num_tokens // self.block_size)
        seconds = self.copy_seconds(True, 1, blocks) + self.copy_seconds(False, 1, blocks)
        return seconds * self.service_rate

    @property
    def copy_rates(self) -> tuple[float, float]:
        """Bytes per second out and in, without the launches; infinite if not measurable."""
        out, inward = (float(self._copies(outward).costs[1]) for outward in (True, False))
        return (MIB / out if out else np.inf, MIB / inward if inward else np.inf)

    @property
    def knows_copies(self) -> bool:
        """Some copy was measured."""
        return bool(self._out.count or self._in.count)

    def _copies(self, outward: bool) -> Fit:
        """What predicts copies this way: until one was measured, those the other way."""
        own, other = (self._out, self._in) if outward else (self._in, self._out)
        return own if own.count or not other.count else other

    def _copy_features(self, runs: int, blocks: int) -> tuple[float, float]:
        return runs, blocks * self.block_bytes / MIB


def waiting_pays(left: float, step: float, runnable: int, blocked: int) -> bool:
    """Whether to hold a step back until a copy ends, instead of running it meanwhile.

    Launching now makes what waits for the copy wait for the end of a step too; holding back
    makes the rows that could run wait for the copy.

    Args:
        left: Seconds until the copy is expected to end.
        step: Seconds of a step.
        runnable: Rows that could run now.
        blocked: Sequences that wait for the copy.
    """
    if step <= 0:
        return False
    late = -(-left // step) * step - left if left > 0 else step
    return late * blocked > left * runnable
