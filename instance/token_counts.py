"""Which tokens a sequence holds and how often: what penalties are a function of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class TokenCounts:
    """Distinct tokens of a sequence that only grows; a token more costs constant time.

    Args:
        num_prompt: Leading tokens that are prompt; the others are output.
    """

    def __init__(self, num_prompt: int) -> None:
        self._num_prompt = num_prompt
        self._seen = 0
        self._places: dict[int, int] = {}
        self._ids = np.empty(64, dtype=np.int64)
        self._outputs = np.zeros(64, dtype=np.int64)

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in what is new of ``tokens``: all of the sequence, of which the leading part
        is known."""
        for index in range(self._seen, len(tokens)):
            token = tokens[index]
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._ids):
                self._ids = np.concatenate((self._ids, np.empty_like(self._ids)))
                self._outputs = np.concatenate((self._outputs, np.zeros_like(self._outputs)))
            self._ids[place] = token
            if index >= self._num_prompt:
                self._outputs[place] += 1
        self._seen = len(tokens)

    def snapshot(self) -> tuple[Ints, Ints]:
        """Distinct token ids, and how often each is in the output; the caller's own."""
        size = len(self._places)
        return self._ids[:size].copy(), self._outputs[:size].copy()
