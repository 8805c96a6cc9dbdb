"""Prefix cache: full KV blocks known by their content.

A block's KV depends on every token before it, so its hash is chained over the hash of the
block before (automatic prefix caching as in vLLM). The root of the chain is the hash of a
*salt* that names model, adapter and whatever else changes KV. Hashes are stable across
processes and machines.

A hash only finds a candidate. A hit is decided by comparing token ids along the chain, so
a collision costs a miss, never a wrong hit.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from instance.kv.prefix_events import PrefixWatcher

DIGEST_BYTES = 16


def hash_root(salt: bytes) -> bytes:
    """The hash that stands before the first block. ``salt`` names model and adapter."""
    return hashlib.blake2b(salt, digest_size=DIGEST_BYTES).digest()


def with_adapter(salt: bytes, adapter: str) -> bytes:
    """The salt of a sequence that uses an adapter; "" means none."""
    return salt + b"\0" + adapter.encode() if adapter else salt


def hash_block(previous: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of a full block, given the hash of the block (or root) before it."""
    packed = struct.pack(f"<{len(tokens)}q", *tokens)
    return hashlib.blake2b(previous + packed, digest_size=DIGEST_BYTES).digest()


def extend_hashes(hashes: list[bytes], tokens: Sequence[int], block_size: int, salt: bytes) -> None:
    """Append to ``hashes`` those of the full blocks of ``tokens`` that it lacks.

    Args:
        hashes: Hashes of the leading full blocks, as far as known; extended in place.
        tokens: All token ids from the start of the sequence.
        block_size: Tokens per block.
        salt: Names model and adapter; the same in every call for a sequence.
    """
    previous = hashes[-1] if hashes else hash_root(salt)
    for first in range(len(hashes) * block_size, len(tokens) - block_size + 1, block_size):
        previous = hash_block(previous, tokens[first : first + block_size])
        hashes.append(previous)


class _Entry:
    """Content of one block: its tokens, and through ``parent`` all tokens before."""

    __slots__ = ("block", "key", "parent", "tokens")

    def __init__(
        self, key: bytes, parent: _Entry | None, tokens: tuple[int, ...], block: int
    ) -> None:
        self.key = key
        self.parent = parent
        self.tokens = tokens
        self.block = block


def _same_content(one: _Entry | None, other: _Entry | None) -> bool:
    # Usually the very same entry; the walk happens only after a parent was evicted and
    # computed anew, or on a collision.
    while one is not other:
        if one is None or other is None or one.tokens != other.tokens:
            return False
        one, other = one.parent, other.parent
    return True


class PrefixIndex:
    """Which block holds which content. One block at most is listed per hash.

    Attributes:
        watcher: Told which hashes come and go; None where nobody wants to know.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.watcher: PrefixWatcher | None = None
        self._by_key: dict[bytes, _Entry] = {}
        self._of_block: dict[int, _Entry] = {}

    def __len__(self) -> int:
        """Blocks that a match can return."""
        return len(self._by_key)

    def lists(self, block: int) -> bool:
        """Whether a match can return this block."""
        entry = self._of_block.get(block)
        return entry is not None and entry.block == block and self._by_key.get(entry.key) is entry

    def knows(self, block: int) -> bool:
        """Whether the block was sealed, listed or not."""
        return block in self._of_block

    def keys(self) -> list[bytes]:
        """The hashes that a match can find."""
        return list(self._by_key)

    def listed(self) -> list[int]:
        """All blocks that a match can return."""
        return [entry.block for entry in self._by_key.values()]

    def seal(self, block: int, parent: int | None, key: bytes, tokens: tuple[int, ...]) -> None:
        """Note that ``block`` is full and holds KV of ``tokens`` after the block ``parent``.

        A block sealed before keeps its entry. A block whose content (or hash) another one
        holds already is known as a parent of later blocks, but not listed.

        Raises:
            ValueError: ``tokens`` is not a full block, or ``parent`` was never sealed.
        """
        if block in self._of_block:
            return
        if len(tokens) != self.block_size:
            raise ValueError(f"block {block}: {len(tokens)} tokens are not a full block")
        before = None
        if parent is not None:
            before = self._of_block.get(parent)
            if before is None:
                raise ValueError(f"block {block}: its parent {parent} is not sealed")
        listed = self._by_key.get(key)
        if listed is not None and listed.tokens == tokens and _same_content(listed.parent, before):
            self._of_block[block] = listed
            return
        entry = _Entry(key, before, tokens, block)
        self._of_block[block] = entry
        if listed is None:
            self._by_key[key] = entry
            if self.watcher is not None:
                self.watcher.stored(key)

    def match(self, tokens: Sequence[int], hashes: Sequence[bytes]) -> list[int]:
        """The listed blocks that hold the leading blocks of ``tokens``, in order.

        ``hashes`` are those of the leading full blocks (``extend_hashes``); pass fewer to
        bound the hit.
        """
        size = self.block_size
        blocks: list[int] = []
        parent: _Entry | None = None
        for index, key in enumerate(hashes):
            entry = self._by_key.get(key)
            if entry is None or entry.tokens != tuple(tokens[index * size : (index + 1) * size]):
                break
            if entry.parent is not parent:
                if not _same_content(entry.parent, parent):
                    break
                entry.parent = parent  # lets go of the evicted one
            blocks.append(entry.block)
            parent = entry
        return blocks

    def forget(self, block: int) -> None:
        """The block's content is about to be lost; no effect if it was never sealed."""
        entry = self._of_block.pop(block, None)
        if entry is not None and entry.block == block and self._by_key.get(entry.key) is entry:
            del self._by_key[entry.key]
            if self.watcher is not None:
                self.watcher.removed(entry.key)
