"""Which instances hold which prefixes, as they tell it in their load reports.

For each block key the holders are one number, a bit per instance: following a prompt along
its keys is an AND per block for all instances at once. Memory is bounded: of the instance
that has most, the keys told first are forgotten.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from instance.kv.prefix_events import KEY_BYTES, PrefixDelta

Ints = NDArray[np.int64]


class PrefixIndex:
    """Keys of the blocks that each instance can serve from its prefix cache.

    Args:
        capacity: Pairs of key and instance kept at most.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._holders: dict[int, int] = {}
        self._keys: dict[int, dict[int, None]] = {}
        self._last: dict[int, int] = {}
        self._pairs = 0

    def __len__(self) -> int:
        """Pairs of key and instance."""
        return self._pairs

    def apply(self, row: int, delta: PrefixDelta) -> bool:
        """Take what an instance tells.

        Args:
            row: The instance's number, at least 0.

        Returns:
            False if a delta is missing: nothing is known of the instance then, until it
            starts anew. A delta that was taken before changes nothing.
        """
        last = self._last.get(row, 0)
        if delta.number <= last:
            return True
        # One that begins before the last says the last again, and what came after it.
        if delta.after == 0 or delta.after > last:
            self.drop(row)
        if delta.after > last:
            return False
        self._last[row] = delta.number
        for key in _numbers(delta.removed):
            self._forget(row, key)
        keys = self._keys.setdefault(row, {})
        bit = 1 << row
        for key in _numbers(delta.stored):
            if key not in keys:
                keys[key] = None
                self._holders[key] = self._holders.get(key, 0) | bit
                self._pairs += 1
        while self._pairs > self.capacity:
            self._evict()
        return True

    def drop(self, row: int) -> None:
        """Forget an instance."""
        for key in self._keys.pop(row, ()):
            self._clear(row, key)
        self._last.pop(row, None)

    def match(self, prompt: bytes, size: int) -> Ints:
        """How many leading blocks of a prompt each instance holds.

        Args:
            prompt: Keys of its leading blocks, one after the other.
            size: Number of rows.

        Returns:
            [size] blocks per row.
        """
        depths = np.zeros(size, np.int64)
        holding = -1
        depth = 0
        holders = self._holders.get
        for key in _numbers(prompt):
            held = holders(key, 0)
            if held != holding:  # most blocks of a prefix are held by the same ones
                still = holding & held
                if still != holding:
                    if depth:
                        _mark(depths, holding & ~still, depth)
                    holding = still
                    if not holding:
                        break
            depth += 1
        if holding > 0:
            _mark(depths, holding, depth)
        return depths

    def _forget(self, row: int, key: int) -> None:
        keys = self._keys.get(row)
        if keys is not None and key in keys:
            del keys[key]
            self._clear(row, key)

    def _clear(self, row: int, key: int) -> None:
        left = self._holders[key] & ~(1 << row)
        if left:
            self._holders[key] = left
        else:
            del self._holders[key]
        self._pairs -= 1

    def _evict(self) -> None:
        row, keys = max(self._keys.items(), key=lambda item: len(item[1]))
        surplus = self._pairs - self.capacity
        for key in list(keys)[: max(surplus, len(keys) // 16)]:
            self._forget(row, key)


def _numbers(packed: bytes) -> tuple[int, ...]:
    """The keys of a delta's or a request's bytes, as numbers, which are quick to find."""
    return struct.unpack_from(f"<{len(packed) // KEY_BYTES}Q", packed)


def _mark(depths: Ints, rows: int, depth: int) -> None:
    if rows.bit_count() <= 8:
        while rows:
            lowest = rows & -rows
            depths[lowest.bit_length() - 1] = depth
            rows ^= lowest
        return
    packed = np.frombuffer(rows.to_bytes(-(-len(depths) // 8), "little"), np.uint8)
    bits = np.unpackbits(packed, count=len(depths), bitorder="little")
    depths[bits.astype(np.bool_)] = depth
