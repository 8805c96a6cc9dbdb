"""How well a cost profile fits: each measurement is predicted from all others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from cluster.simulation.profile_fit import held_out


@dataclass(frozen=True, slots=True)
class Check:
    """A measurement, and what the others predict for it.

    Attributes:
        what: What was measured.
        seconds: What it took.
        predicted: By a fit that had not seen it.
    """

    what: str
    seconds: float
    predicted: float

    @property
    def error(self) -> float:
        """(Predicted - measured) / measured."""
        return self.predicted / self.seconds - 1.0


def check_fit(
    labels: Sequence[str],
    samples: Sequence[Any],
    predict: Callable[[Sequence[Any], Any], float],
) -> list[Check]:
    """What is predicted for each measurement by a fit of all others.

    Args:
        labels: What was measured.
        samples: The measurements.
        predict: From (the others, the one left out) to its seconds.
    """
    return [
        Check(label, sample.seconds, predicted)
        for label, (sample, predicted) in zip(labels, held_out(samples, predict), strict=True)
    ]


def format_checks(checks: Sequence[Check]) -> str:
    """A table for people: each measurement, and what the others predict for it."""
    width = max((len(check.what) for check in checks), default=0)
    lines = [f"{'left out of the fit':{width}}   measured  predicted    error"]
    lines += [
        f"{check.what:{width}} {1000 * check.seconds:8.3f}ms {1000 * check.predicted:8.3f}ms "
        f"{100 * check.error:+7.1f}%"
        for check in checks
    ]
    if checks:
        errors = [abs(check.error) for check in checks]
        lines.append(
            f"error of what was left out: mean {100 * fmean(errors):.1f}%, "
            f"largest {100 * max(errors):.1f}%"
        )
    return "\n".join(lines)
