"""How steps scatter, from what work took beside what a cost profile says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import pstdev

import numpy as np
from numpy.typing import NDArray

from cluster.simulation.scatter import SHORTEST_SPELL, Scatter

_SPEEDS = 10
"""Speeds of a fitted law."""
_ENDS = 0.05
"""Share at either end that counts as if it were no further out: one stall is not a law."""
_SLOWEST = 0.05
"""Least speed of a fitted law."""
_LONGEST = 4.0
"""Spells are sought from the length of the first pieces of work, within which nothing is told
apart, to so many times that of the others."""
_ROUNDS = 4
_CORRECTION = 3.0
"""Factor by which a law is corrected at most."""


@dataclass(frozen=True, slots=True)
class Work:
    """Steps in a row: the seconds that they took, and those by the profile; both above 0."""

    seconds: float
    predicted: float

    @property
    def speed(self) -> float:
        """Mean speed of the device meanwhile, where the profile's is 1."""
        return self.predicted / self.seconds


def fit_scatter(pairs: Sequence[tuple[Work, Work]]) -> Scatter | None:
    """Speeds and the length of a spell.

    The more of a speed is still there in what follows at once, the longer are the spells.
    Speeds are those of the first pieces, so their law has whatever shape was measured, scaled
    up by what averaging has taken from their spread, and by their mean to a mean of 1.

    Args:
        pairs: Two pieces of work on one device, the second right after the first.

    Returns:
        None where there are too few, or the first pieces all have the same speed.
    """
    if len(pairs) < _SPEEDS:
        return None
    (speeds, later), (first, second) = (
        [np.array(column) for column in zip(*rows, strict=True)]
        for rows in (
            [(one.speed, two.speed) for one, two in pairs],
            [(one.seconds, two.seconds) for one, two in pairs],
        )
    )
    speeds = speeds / speeds.mean()
    if np.ptp(speeds) == 0.0:
        return None
    near, following = _within(speeds), _within(later / later.mean())
    variance = float(near.var())
    lasting = float(np.cov(near, following, bias=True)[0, 1]) / variance if variance else 0.0
    spell = _spell(float(first.mean()), float(second.mean()), lasting)
    groups = np.array_split(np.sort(speeds), _SPEEDS)
    means = np.array([group.mean() for group in groups])
    return Scatter(_spread_by(means, _left(float(first.mean()) / spell) ** -0.5), spell)


def shown_by(
    measured: Scatter, simulated: Callable[[Scatter], Scatter | None], rounds: int = _ROUNDS
) -> Scatter:
    """The law under which a simulation shows what was measured.

    Of two runs of one load in which steps scatter, requests also differ by what they meet: a
    fit takes that for scatter. It does so with simulated runs too, which tells how much it is.

    Args:
        measured: Fitted to a load.
        simulated: What the same fit makes of a simulation of that load under a law.
        rounds: Of correcting the law by what it shows.
    """
    law, factor, longer = measured, 1.0, 1.0
    for _ in range(rounds):
        shown = simulated(law)
        if shown is None:
            break
        # What requests meet only adds to what is taken for scatter, and does not last.
        factor *= pstdev(measured.speeds) / pstdev(shown.speeds)
        factor = min(1.0, max(1.0 / _CORRECTION, factor))
        longer = min(_CORRECTION, max(1.0, longer * measured.spell / shown.spell))
        speeds = _spread_by(np.array(measured.speeds), factor)
        law = Scatter(speeds, max(SHORTEST_SPELL, measured.spell * longer))
    return law


def _within(speeds: NDArray[np.float64]) -> NDArray[np.float64]:
    low, high = np.quantile(speeds, (_ENDS, 1.0 - _ENDS))
    return np.clip(speeds, low, high)


def _spread_by(speeds: NDArray[np.float64], factor: float) -> tuple[float, ...]:
    """Speeds with a mean of 1, so many times as far apart."""
    spread = np.maximum(_SLOWEST, 1.0 + (speeds - 1.0) * factor)
    made: tuple[float, ...] = tuple((spread / spread.mean()).tolist())
    return made


def _left(spells: float) -> float:
    """Variance of the mean speed over a time of so many spells, where that in one is 1.

    The speeds at two instants are the same as long as no border of spells lies between them.
    """
    return 1.0 - spells / 3.0 if spells <= 1.0 else (1.0 - 1.0 / (3.0 * spells)) / spells


def _lasting(first: float, second: float) -> float:
    """Which part of a difference in mean speed over a time of ``first`` spells is still there
    in the ``second`` spells that follow, on average."""

    def of_sum(spells: float) -> float:
        return spells**2 * _left(spells)

    both = of_sum(first + second) - of_sum(first) - of_sum(second)
    return both / 2.0 / (first * second) / _left(first)


def _spell(first: float, second: float, lasting: float) -> float:
    """The length of spells at which that part of a difference lasts."""
    low = max(SHORTEST_SPELL, first)
    high = max(low, second * _LONGEST)
    for _ in range(40):
        middle = (low * high) ** 0.5
        if _lasting(first / middle, second / middle) < lasting:
            low = middle
        else:
            high = middle
    return high
