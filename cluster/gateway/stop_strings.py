"""Finds stop strings in streamed text, without ever letting out a part of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Cuts a text at the first stop string that completes in it.

    How the text is split into pieces makes no difference. Of two that complete at the same
    character the longer one counts. One Knuth-Morris-Pratt automaton per stop string:
    constant work per character and stop string, whatever the text.

    Args:
        stops: Strings at which the text ends; none is empty.
        include: The stop string stays in the text.

    Attributes:
        matched: The stop string found, or None.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self.matched: str | None = None
        # The longest first, so that it wins where several complete at once.
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._include = include
        self._held = ""

    def push(self, text: str) -> str:
        """Take the next piece of text; returns what can be shown now.

        What could still become a stop string is held back. Once ``matched`` is set nothing
        more comes out.
        """
        if self.matched is not None or not self._stops:
            return "" if self.matched is not None else text
        buffer = self._held + text
        states = self._states
        for position, char in enumerate(text, len(self._held) + 1):
            for index, stop in enumerate(self._stops):
                state = states[index]
                borders = self._borders[index]
                while state and stop[state] != char:
                    state = borders[state - 1]
                if stop[state] == char:
                    state += 1
                if state == len(stop):
                    self.matched = stop
                    self._held = ""
                    return buffer[: position if self._include else position - len(stop)]
                states[index] = state
        shown = len(buffer) - max(states)
        self._held = buffer[shown:]
        return buffer[:shown]

    def flush(self) -> str:
        """The text ended: returns what was held back."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._stops)
        return held


def _borders(word: str) -> list[int]:
    """For each prefix of ``word``, the length of its longest proper prefix that ends it."""
    borders = [0] * len(word)
    length = 0
    for index in range(1, len(word)):
        while length and word[index] != word[length]:
            length = borders[length - 1]
        if word[index] == word[length]:
            length += 1
        borders[index] = length
    return borders
