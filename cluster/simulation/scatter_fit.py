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
_ENDS = 0.1
"""Share at either end that the spread of speeds leaves out: one stall is not a law."""
_NORMAL = 2.563
"""What is between these ends of a normal law, in standard deviations."""
_SLOWEST = 0.05
"""Least speed of a fitted law."""
_ROUNDS = 4
_CORRECTION = 2.0
"""Factor by which a round corrects a law at most."""
_LONGEST = 4.0
"""Spells are taken to be at most so many times as long as the longer pieces of work."""


@dataclass(frozen=True, slots=True)
class Work:
    """Steps in a row: the seconds that they took, and those by the profile; both above 0."""

    seconds: float
    predicted: float

    @property
    def speed(self) -> float:
        """Mean speed of the device meanwhile, where the profile's is 1."""
        return self.predicted / self.seconds


def fit_scatter(short: Sequence[Work], long: Sequence[Work]) -> Scatter | None:
    """Speeds and the length of a spell.

    Mean speeds over a long time differ less than those over a short one, the less the shorter
    the spells are: that tells their length. Speeds are those of the short pieces, so their
    law has whatever shape was measured, scaled up by what averaging has taken from their
    spread, and by their mean to a mean of 1.

    Args:
        short: Pieces of work that mostly lie within one spell.
        long: Longer ones, measured under the same conditions.

    Returns:
        None where there are too few pieces, or all short ones have the same speed.
    """
    if min(len(short), len(long)) < _SPEEDS:
        return None
    speeds = _speeds(short)
    spread = _spread(speeds)
    if spread == 0.0:
        return None
    lengths = [float(np.mean([one.seconds for one in part])) for part in (short, long)]
    spell = _spell(lengths[0], lengths[1], _spread(_speeds(long)) / spread)
    groups = np.array_split(np.sort(speeds), _SPEEDS)
    means = np.array([group.mean() for group in groups])
    return Scatter(_spread_by(means, _left(lengths[0] / spell) ** -0.5), spell)


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
    law = measured
    for _ in range(rounds):
        shown = simulated(law)
        if shown is None:
            break
        factor, longer = (
            min(_CORRECTION, max(1.0 / _CORRECTION, one))
            for one in (
                pstdev(measured.speeds) / pstdev(shown.speeds),
                measured.spell / shown.spell,
            )
        )
        speeds = _spread_by(np.array(law.speeds), factor)
        law = Scatter(speeds, max(SHORTEST_SPELL, law.spell * longer))
    return law


def _spread_by(speeds: NDArray[np.float64], factor: float) -> tuple[float, ...]:
    """Speeds with a mean of 1, so many times as far apart."""
    spread = np.maximum(_SLOWEST, 1.0 + (speeds - 1.0) * factor)
    made: tuple[float, ...] = tuple((spread / spread.mean()).tolist())
    return made


def _speeds(work: Sequence[Work]) -> NDArray[np.float64]:
    """Of each piece, relative to the mean of all."""
    speeds: NDArray[np.float64] = np.array([one.speed for one in work])
    relative: NDArray[np.float64] = speeds / speeds.mean()
    return relative


def _spread(speeds: NDArray[np.float64]) -> float:
    """A standard deviation that ignores what is far out."""
    low, high = np.quantile(speeds, (_ENDS, 1.0 - _ENDS))
    return float(high - low) / _NORMAL


def _left(spells: float) -> float:
    """Variance of the mean speed over a time of so many spells, where that in one is 1.

    The speeds at two instants are the same as long as no border of spells lies between them.
    """
    return 1.0 - spells / 3.0 if spells <= 1.0 else (1.0 - 1.0 / (3.0 * spells)) / spells


def _spell(short: float, long: float, ratio: float) -> float:
    """The length of spells at which spreads over two times have a ratio.

    It lies between a length at which hardly anything is left over either time, and one at
    which hardly anything is lost.
    """
    low, high = max(SHORTEST_SPELL, short / _LONGEST), max(SHORTEST_SPELL, long * _LONGEST)
    for _ in range(40):
        middle = (low * high) ** 0.5
        if _left(long / middle) < ratio**2 * _left(short / middle):
            low = middle
        else:
            high = middle
    return high
