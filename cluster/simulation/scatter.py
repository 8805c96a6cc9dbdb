"""How unevenly a device works: fast and slow spells, drawn by number."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import isfinite
from statistics import fmean

_EXACT = 1e-3
"""By how much the mean speed may differ from 1."""
SHORTEST_SPELL = 1e-3
"""Seconds."""


@dataclass(frozen=True, slots=True)
class Scatter:
    """Speeds at which a device does its steps, one after the other.

    Attributes:
        speeds: Relative to what steps take by their formula. Each holds for the same share of
            the time, so their mean is 1.
        spell: Seconds for which a speed holds.

    Raises:
        ValueError: if a number makes no sense.
    """

    speeds: tuple[float, ...]
    spell: float

    def __post_init__(self) -> None:
        if not self.speeds or not all(isfinite(speed) and speed > 0 for speed in self.speeds):
            raise ValueError(f"speeds: {self.speeds} are not above 0")
        if abs(fmean(self.speeds) - 1.0) > _EXACT:
            raise ValueError(f"speeds: their mean is {fmean(self.speeds):.4f}, not 1")
        if not isfinite(self.spell) or self.spell < SHORTEST_SPELL:
            raise ValueError(f"spell: {self.spell} is not at least {SHORTEST_SPELL} s")


class Pace:
    """When steps end on one device: a function of time, whatever was asked before.

    Args:
        scatter: What speeds there are.
        seed: Of the run.
        name: Of the device; each has its own spells.
    """

    def __init__(self, scatter: Scatter, seed: int, name: str) -> None:
        self._speeds, self._spell = scatter.speeds, scatter.spell
        self._key = hashlib.blake2b(f"pace\0{seed}\0{name}".encode(), digest_size=16).digest()

    def speed(self, spell: int) -> float:
        """In the spell of a number."""
        number = spell.to_bytes(8, "little")
        digest = hashlib.blake2b(number, digest_size=8, key=self._key).digest()
        return self._speeds[(int.from_bytes(digest, "little") * len(self._speeds)) >> 64]

    def end(self, began: float, seconds: float) -> float:
        """When a step ends that would take ``seconds`` at speed 1.

        Args:
            began: When it begins, on a clock that starts at 0.
            seconds: Its duration by the formula.
        """
        spell = int(began / self._spell)
        while True:
            border, speed = (spell + 1) * self._spell, self.speed(spell)
            end = began + seconds / speed
            if end <= border:
                return end
            seconds = max(0.0, seconds - max(0.0, border - began) * speed)
            began, spell = max(began, border), spell + 1
