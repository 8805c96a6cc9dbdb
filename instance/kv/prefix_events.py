"""What an instance tells of its prefix cache: keys of blocks that can be hit, and no longer.

A *key* is the first eight bytes of a block's chained hash. Whoever decides where a request
goes needs no more: an accidental match costs a worse choice, never a wrong hit.

Changes are collected by key, so that a block that came and went between two reports costs
nothing, and leave in numbered *deltas* of bounded size. A receiver that missed one notices
by the numbers and asks for a new start.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from instance.kv.prefix import extend_hashes

KEY_BYTES = 8
DELTA_KEYS = 2048
"""Keys that one delta holds at most; a delta of two, at most four times as many."""
PROMPT_KEYS = 256
"""Leading blocks of a prompt by which instances are compared at most."""


class PrefixWatcher(Protocol):
    """Told what a prefix cache lists."""

    def stored(self, key: bytes) -> None:
        """A match can return this block from now on."""

    def removed(self, key: bytes) -> None:
        """It no longer can."""


@dataclass(frozen=True, slots=True)
class PrefixDelta:
    """Changes of a prefix cache.

    Attributes:
        after: Number of the delta before; 0 if the receiver shall forget what it knew.
        number: Number of this one, more than ``after``.
        stored: Keys that came, one after the other.
        removed: Keys that went.
    """

    after: int
    number: int
    stored: bytes
    removed: bytes


def keys_of(packed: bytes) -> list[bytes]:
    """The single keys of a delta's or a request's bytes."""
    return [packed[at : at + KEY_BYTES] for at in range(0, len(packed), KEY_BYTES)]


def prompt_keys(tokens: Sequence[int], block_size: int, salt: bytes) -> bytes:
    """The keys of a prompt's leading full blocks, at most ``PROMPT_KEYS``.

    The last token is always computed, so a block that ends with it is left out.
    """
    hashes: list[bytes] = []
    length = min(len(tokens) - 1, PROMPT_KEYS * block_size)
    extend_hashes(hashes, tokens[: max(0, length)], block_size, salt)
    return b"".join(key[:KEY_BYTES] for key in hashes)


def merge(older: PrefixDelta | None, newer: PrefixDelta | None) -> PrefixDelta | None:
    """One delta for two that follow each other, of which the older was not sent.

    Where they do not, or would be too large together, the newer remains; the receiver then
    notices that one is missing.
    """
    if older is None or newer is None:
        return newer or older
    if newer.after != older.number:
        return newer
    last: dict[bytes, bool] = {}
    for delta in (older, newer):
        last.update(dict.fromkeys(keys_of(delta.removed), False))
        last.update(dict.fromkeys(keys_of(delta.stored), True))
    if len(last) > 4 * DELTA_KEYS:
        return newer
    return _delta(older.after, newer.number, last)


def _delta(after: int, number: int, last: dict[bytes, bool]) -> PrefixDelta:
    return PrefixDelta(
        after,
        number,
        b"".join(key for key, stored in last.items() if stored),
        b"".join(key for key, stored in last.items() if not stored),
    )


class PrefixEvents:
    """Collects what a prefix cache lists; one per instance."""

    def __init__(self) -> None:
        self._pending: dict[bytes, bool] = {}
        self._number = 0
        self._fresh = True

    @property
    def pending(self) -> bool:
        """Something has not been taken yet."""
        return bool(self._pending)

    def stored(self, key: bytes) -> None:
        """A match can return this block from now on."""
        self._pending[key[:KEY_BYTES]] = True

    def removed(self, key: bytes) -> None:
        """It no longer can."""
        self._pending[key[:KEY_BYTES]] = False

    def restart(self, keys: Iterable[bytes]) -> None:
        """Tell everything anew: ``keys`` are all that can be hit."""
        self._pending = {key[:KEY_BYTES]: True for key in keys}
        self._fresh = True

    def take(self) -> PrefixDelta | None:
        """The next delta; None if there is nothing to tell."""
        if not self._pending and not self._fresh:
            return None
        after = 0 if self._fresh else self._number
        self._fresh = False
        self._number += 1
        if len(self._pending) <= DELTA_KEYS:
            taken, self._pending = self._pending, {}
        else:
            taken = {key: self._pending[key] for key in list(self._pending)[:DELTA_KEYS]}
            for key in taken:
                del self._pending[key]
        return _delta(after, self._number, taken)
