"""Costs from measurements: non-negative least squares over relative errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cluster.simulation.profile import CopyCost, LinkCost
from instance.step_cost import StepCost

Sample = TypeVar("Sample")
Floats = NDArray[np.float64]

_STEP_COSTS = 5
"""Costs that are linear in a step's shape; ``hidden_tokens`` is searched."""
_TRIED = 8
"""Intervals into which a range that is searched is cut."""
_FINE = 2e-4
"""Seconds to which an overhead is found."""
_SHORTEST = 1e-6
"""Seconds that a step takes at least."""


@dataclass(frozen=True, slots=True)
class StepSample:
    """A step of a known shape (see ``StepCost.of``) and the seconds it took."""

    prefill: int
    prefill_context: int
    decodes: int
    decode_context: int
    seconds: float

    def predicted(self, cost: StepCost) -> float:
        """Seconds by ``cost``."""
        return cost.of(self.prefill, self.prefill_context, self.decodes, self.decode_context)


@dataclass(frozen=True, slots=True)
class CopySample:
    """``copies`` contiguous copies of ``num_bytes`` in all, and the seconds they took."""

    copies: int
    num_bytes: int
    seconds: float

    def predicted(self, cost: CopyCost) -> float:
        """Seconds by ``cost``."""
        return cost.seconds(self.num_bytes, self.copies)


def fit_steps(samples: Sequence[StepSample]) -> StepCost:
    """The costs with the least relative errors, squared and summed.

    Raises:
        ValueError: if there are fewer samples than parameters.
    """
    if len(samples) <= _STEP_COSTS:
        raise ValueError(f"{len(samples)} steps are too few to fit {_STEP_COSTS + 1} costs")
    table = np.array(
        [(s.prefill, s.prefill_context, s.decodes, s.decode_context) for s in samples], float
    )
    seconds = np.array([sample.seconds for sample in samples])
    # Where the squared error has its valley is searched, ever closer around the best.
    step = max(1, int(table[:, 0].max()) // 16)
    tried = range(0, 8 * step + 1, step)
    while True:
        found = min((_with_hidden(table, seconds, hidden) for hidden in tried), key=lambda f: f[0])
        if step == 1:
            return found[1]
        at, reach, step = int(found[1].hidden_tokens), step, max(1, step // 4)
        tried = range(max(0, at - reach), at + reach + 1, step)


def fit_with_overhead(
    steps: Sequence[StepSample], firsts: Sequence[StepSample]
) -> tuple[StepCost, float]:
    """Costs of steps, and the seconds that a request takes beside its step.

    Args:
        steps: Steps alone.
        firsts: Times from a request to its first token, each with the step that made it.

    Raises:
        ValueError: if there are no firsts, or fewer samples than parameters.
    """
    if not firsts:
        raise ValueError("no time to a first token was measured")

    def fitted(overhead: float) -> tuple[float, float, StepCost]:
        cost = fit_steps([*steps, *without_overhead(firsts, overhead)])
        error = sum(relative_error(one, cost) ** 2 for one in steps)
        error += sum(((one.predicted(cost) + overhead) / one.seconds - 1.0) ** 2 for one in firsts)
        return error, overhead, cost

    # As for what is hidden: ever closer around the best.
    low, high = 0.0, min(one.seconds for one in firsts)
    while True:
        width = (high - low) / _TRIED
        _, overhead, cost = min(
            (fitted(low + number * width) for number in range(_TRIED + 1)), key=lambda f: f[:2]
        )
        if width < _FINE:
            return cost, overhead
        low, high = max(0.0, overhead - width), min(high, overhead + width)


def without_overhead(firsts: Sequence[StepSample], overhead: float) -> list[StepSample]:
    """The steps behind times to a first token."""
    return [replace(one, seconds=max(one.seconds - overhead, _SHORTEST)) for one in firsts]


def _with_hidden(table: Floats, seconds: Floats, hidden: int) -> tuple[float, StepCost]:
    """The sum of squared relative errors, and the costs."""
    seen = np.maximum(0.0, table[:, 0] - np.maximum(0.0, hidden - table[:, 2]))
    features = np.column_stack([np.ones(len(seconds)), seen, table[:, 1:]])
    costs, error = _fit(features, seconds)
    base, prefill, prefill_context, decode, decode_context = costs.tolist()
    return error, StepCost(base, prefill, decode, decode_context, prefill_context, hidden)


def _fit(features: Floats, seconds: Floats) -> tuple[Floats, float]:
    """Costs of features, none negative, and the sum of squared relative errors they leave.

    With so few features the best of all choices of those whose cost is above 0 is the exact
    solution; mostly the first one tried, all of them, is feasible and then the best.
    """
    relative = features / seconds[:, None]
    scale = np.maximum(np.abs(relative).max(axis=0), 1e-300)
    relative = relative / scale
    size = relative.shape[1]
    best, least = np.zeros(size), float(len(seconds))
    for count in range(size, 0, -1):
        for chosen in itertools.combinations(range(size), count):
            part = relative[:, chosen]
            costs = np.linalg.lstsq(part, np.ones(len(seconds)), rcond=None)[0]
            error = float(((part @ costs - 1.0) ** 2).sum())
            if (costs >= 0).all() and error < least:
                best, least = np.zeros(size), error
                best[list(chosen)] = costs
                if count == size:
                    return best / scale, least
    return best / scale, least


def fit_copies(samples: Sequence[CopySample]) -> CopyCost:
    """Bandwidth and launch cost with the least relative errors.

    Where more bytes took no longer, the bandwidth is the highest that was seen.

    Raises:
        ValueError: if there are fewer than two samples.
    """
    if len(samples) < 2:
        raise ValueError("two copies are too few" if samples else "no copy was measured")
    features = np.array([(one.copies, one.num_bytes) for one in samples], float)
    costs, _ = _fit(features, np.array([one.seconds for one in samples]))
    launch, byte = costs.tolist()
    return CopyCost(_bandwidth(byte, samples), launch)


def _bandwidth(byte: float, samples: Sequence[CopySample]) -> float:
    return 1.0 / byte if byte > 0 else max(one.num_bytes / one.seconds for one in samples)


def fit_link(samples: Sequence[CopySample]) -> LinkCost:
    """Costs of a link, from copies that a reply follows: two messages each.

    Where more bytes took no longer, the bandwidth is the highest that was seen.

    Raises:
        ValueError: if there are fewer than three samples.
    """
    if len(samples) < 3:
        raise ValueError(f"{len(samples)} copies are too few to fit a link")
    features = np.array([(1, one.copies, one.num_bytes) for one in samples], float)
    costs, _ = _fit(features, np.array([one.seconds for one in samples]))
    both, launch, byte = costs.tolist()
    return LinkCost(_bandwidth(byte, samples), launch, both / 2)


def relative_error(sample: StepSample, cost: StepCost) -> float:
    """(Predicted - measured) / measured."""
    return sample.predicted(cost) / sample.seconds - 1.0


def held_out(
    samples: Sequence[Sample], predict: Callable[[Sequence[Sample], Sample], float]
) -> list[tuple[Sample, float]]:
    """Each sample with what is predicted for it from all others.

    Args:
        samples: The measurements.
        predict: From (the others, the one left out) to its seconds.
    """
    return [
        (sample, predict([*samples[:index], *samples[index + 1 :]], sample))
        for index, sample in enumerate(samples)
    ]


def predict_step(others: Sequence[StepSample], sample: StepSample) -> float:
    """Seconds of ``sample`` by what fits the others."""
    return sample.predicted(fit_steps(others))


def predict_link(others: Sequence[CopySample], sample: CopySample) -> float:
    """Seconds of ``sample``, its reply included, by what fits the others."""
    cost = fit_link(others)
    return cost.seconds(sample.num_bytes, sample.copies) + cost.latency


def predict_copy(others: Sequence[CopySample], sample: CopySample) -> float:
    """Seconds of ``sample`` by what fits the others."""
    return sample.predicted(fit_copies(others))
