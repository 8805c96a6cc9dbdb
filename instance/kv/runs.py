"""Contiguous runs of blocks: of a block list, and of free memory."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable


def runs(blocks: Iterable[int]) -> list[tuple[int, int]]:
    """The contiguous runs (first, count) of a block list, in its order."""
    found: list[tuple[int, int]] = []
    first = count = 0
    for block in blocks:
        if count and block == first + count:
            count += 1
            continue
        if count:
            found.append((first, count))
        first, count = block, 1
    if count:
        found.append((first, count))
    return found


class FreeRuns:
    """Maximal runs of free blocks, found by place and by size."""

    def __init__(self) -> None:
        self.total = 0
        self._count_at: dict[int, int] = {}
        self._first_by_end: dict[int, int] = {}
        self._by_size: list[tuple[int, int]] = []  # (count, first), ascending

    def __len__(self) -> int:
        return len(self._by_size)

    def items(self) -> list[tuple[int, int]]:
        """All runs as (first, count), by place."""
        return sorted(self._count_at.items())

    def count_at(self, first: int) -> int:
        """Length of the run that starts at ``first``; 0 if none does."""
        return self._count_at.get(first, 0)

    def largest(self) -> tuple[int, int]:
        """(first, count) of a longest run; (0, 0) if there is none."""
        if not self._by_size:
            return 0, 0
        count, first = self._by_size[-1]
        return first, count

    def best_fit(self, n: int) -> tuple[int, int] | None:
        """(first, count) of the shortest run of at least ``n`` blocks, or None."""
        index = bisect_left(self._by_size, (n, -1))
        if index == len(self._by_size):
            return None
        count, first = self._by_size[index]
        return first, count

    def add(self, first: int, count: int) -> None:
        """Give back a run; it merges with its neighbours."""
        self.total += count
        before = self._first_by_end.get(first)
        if before is not None:
            count += self._forget(before)
            first = before
        if first + count in self._count_at:
            count += self._forget(first + count)
        self._note(first, count)

    def carve(self, first: int, offset: int, count: int) -> None:
        """Take ``count`` blocks, ``offset`` into the run that starts at ``first``."""
        whole = self._forget(first)
        self.total -= count
        if offset:
            self._note(first, offset)
        if offset + count < whole:
            self._note(first + offset + count, whole - offset - count)

    def _note(self, first: int, count: int) -> None:
        self._count_at[first] = count
        self._first_by_end[first + count] = first
        insort(self._by_size, (count, first))

    def _forget(self, first: int) -> int:
        count = self._count_at.pop(first)
        del self._first_by_end[first + count]
        del self._by_size[bisect_left(self._by_size, (count, first))]
        return count
