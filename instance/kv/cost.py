"""What moving KV and computing it anew cost here, learned from what both took so far."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from instance.budget import StepCostLearner
from instance.fairness import service
from instance.fit import Fit
from instance.request import Row

MIB = 1 << 20

# Before anything is measured: a launch, and a MiB at 2 GiB/s.
_COPY_PRIOR = (2e-5, 1 / 2048)
# Weight that older measurements keep at each new one.
_COPY_MEMORY, _SERVICE_MEMORY = 0.95, 0.99


class SwapCost:
    """Predicts copies and prefills of one instance, in seconds and in service.

    Args:
        block_bytes: Bytes of a KV block.
        block_size: Tokens of a KV block.
        steps: What steps cost here.
    """

    def __init__(self, block_bytes: int, block_size: int, steps: StepCostLearner) -> None:
        self.block_bytes = block_bytes
        self.block_size = block_size
        self._out = Fit(_COPY_PRIOR, _COPY_MEMORY)
        self._in = Fit(_COPY_PRIOR, _COPY_MEMORY)
        self._steps = steps
        self._service = 0.0
        self._seconds = 0.0

    # ---- measurements

    def observe_copy(self, outward: bool, runs: int, blocks: int, seconds: float) -> None:
        """A job of so many runs and blocks took so long, without the wait for its turn."""
        fit = self._out if outward else self._in
        fit.observe(self._copy_features(runs, blocks), seconds)

    def observe_step(self, rows: Sequence[Row], seconds: float) -> None:
        """A step with these rows kept the device busy for so long."""
        prefill = sum(row.length for row in rows if row.length > 1)
        decodes = sum(1 for row in rows if row.length == 1)
        self._observe(service(prefill, decodes), seconds)

    def observe_decodes(self, rows: Sequence[Row], seconds: Iterable[float]) -> None:
        """Steps that only decode, one after the other, each with as many rows."""
        for one in seconds:
            self._observe(service(0, len(rows)), one)

    def _observe(self, given: float, seconds: float) -> None:
        self._service = _SERVICE_MEMORY * self._service + given
        self._seconds = _SERVICE_MEMORY * self._seconds + seconds

    # ---- predictions

    def copy_seconds(self, outward: bool, runs: int, blocks: int) -> float:
        """Seconds that a copy of ``blocks`` blocks in ``runs`` runs takes."""
        return self._copies(outward).seconds(self._copy_features(runs, blocks)) if blocks else 0.0

    def prefill_seconds(self, start: int, end: int) -> float:
        """Seconds that positions [start, end) add to the steps which compute them."""
        return self._steps.costs.prefill_seconds(start, end - start)

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
        return (MIB / out if out else math.inf, MIB / inward if inward else math.inf)

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
