"""The KV block pool: who holds which block, and where new ones come from.

Blocks are handed out as *block groups*, contiguous runs, so that moving a sequence is a
few large copies (the idea of FastSwitch, arXiv 2411.18424); when memory is fragmented the
pool still works block by block, and users only ever see plain block ids.

Each block but the null block 0 is in exactly one state:

- *free*: no content worth keeping; part of a free run.
- *cached*: nobody holds it, but the prefix index lists its content; reused last, least
  recently released first.
- *held*: referenced by one or more sequences.
- *reserved*: promised to an incoming migration, not yet part of a sequence.
- *draining*: nobody holds it, but it is pinned by a copy; reused only when unpinned.

A pin count stands beside the reference count: blocks that a copy reads or writes are
pinned through whatever happens to their sequence.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from instance.kv.prefix import PrefixIndex
from instance.kv.runs import FreeRuns
from instance.kv.runs import runs as runs

NULL_BLOCK = 0

# To get one run where free memory lies in pieces, at most this share of the pool is evicted
# from the prefix cache beyond need, in steps of so many blocks. Measured in a full cache
# under churn: 3.6 runs per sequence of 37 blocks instead of 33, at 22.5 % instead of 24.3 %
# of prompt tokens hit.
_GATHER_SHARE = 32
_GATHER_STEP = 8


class IntegrityError(AssertionError):
    """The pool's books are wrong, or a caller used a block that it does not have."""


class BlockState(enum.StrEnum):
    """The one state a block is in; see the module's docstring."""

    FREE = "free"
    CACHED = "cached"
    HELD = "held"
    RESERVED = "reserved"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Fragmentation:
    """How the free memory lies, in blocks; cached blocks do not count as free here."""

    free: int
    runs: int
    largest_run: int


class BlockPool:
    """Accounts for the KV blocks of one instance; holds no KV itself.

    Args:
        num_blocks: Blocks in the pool, the null block 0 included.
        block_size: Tokens per block.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 2 or block_size < 1:
            raise ValueError(f"no pool of {num_blocks} blocks of {block_size} tokens")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix = PrefixIndex(block_size)
        self._refs = [0] * num_blocks
        self._pins: dict[int, int] = {}
        self._reserved: set[int] = set()
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently released first
        self._free = FreeRuns()
        self._free.add(1, num_blocks - 1)

    # ---- figures

    @property
    def num_usable(self) -> int:
        """Blocks that can ever be handed out."""
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out now: free and cached."""
        return self._free.total + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and whose content can be hit."""
        return len(self._cached)

    @property
    def num_reserved(self) -> int:
        """Blocks reserved and not yet committed."""
        return len(self._reserved)

    @property
    def num_draining(self) -> int:
        """Blocks that wait only for their pins."""
        return sum(
            1 for block in self._pins if not self._refs[block] and block not in self._reserved
        )

    def fragmentation(self) -> Fragmentation:
        """How the free memory lies."""
        return Fragmentation(self._free.total, len(self._free), self._free.largest()[1])

    def state(self, block: int) -> BlockState:
        """The block's state. Raises IntegrityError for the null block and unknown ids."""
        if not 0 < block < self.num_blocks:
            raise IntegrityError(f"block {block} is not one of 1..{self.num_blocks - 1}")
        if self._refs[block]:
            return BlockState.HELD
        if block in self._reserved:
            return BlockState.RESERVED
        if block in self._pins:
            return BlockState.DRAINING
        return BlockState.CACHED if block in self._cached else BlockState.FREE

    def num_references(self, block: int) -> int:
        """How many holders the block has."""
        return self._refs[block]

    def num_idle(self, blocks: Iterable[int]) -> int:
        """How many of these blocks are counted in ``num_free``."""
        return sum(1 for block in blocks if block in self._cached)

    # ---- handing out

    def allocate(self, n: int, after: int | None = None) -> list[int] | None:
        """Hand out ``n`` blocks, each with one reference; None if fewer can be had.

        The blocks are one run where a free run allows it: right behind the block ``after``
        (the caller's last one) if that is free, else the best fit. A single block that
        cannot follow ``after`` starts in the middle of the largest free run, which leaves
        room to grow to it and to its neighbour. Cached blocks are evicted, least recently
        released first, if the free ones do not suffice, and a few more (a bounded share of
        the pool) if that makes one run of what would be several.
        """
        blocks = self._take(n, after)
        for block in blocks or ():
            self._refs[block] = 1
        return blocks

    def reserve(self, n: int, after: int | None = None) -> list[int] | None:
        """As ``allocate``, but the blocks are reserved until committed or released."""
        blocks = self._take(n, after)
        self._reserved.update(blocks or ())
        return blocks

    def commit(self, blocks: Iterable[int]) -> None:
        """Reserved blocks become held, with one reference each."""
        for block in blocks:
            if block not in self._reserved:
                raise IntegrityError(f"commit: block {block} is {self.state(block)}")
            self._reserved.remove(block)
            self._refs[block] = 1

    def acquire(self, blocks: Iterable[int]) -> None:
        """Add a reference to each block: held, or unheld with content (a prefix hit)."""
        for block in blocks:
            if not self._refs[block]:
                if not self.prefix.lists(block):
                    raise IntegrityError(f"acquire: block {block} is {self.state(block)}")
                self._cached.pop(block, None)
            self._refs[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference (or the reservation) of each block.

        In reverse order, so that of a sequence's blocks the last ones are evicted first.
        """
        loose: list[int] = []
        for block in reversed(blocks):
            if self._refs[block]:
                self._refs[block] -= 1
                if self._refs[block]:
                    continue
            elif block in self._reserved:
                self._reserved.remove(block)
            else:
                raise IntegrityError(f"release: block {block} is {self.state(block)}")
            loose.append(block)
        self._settle(loose)

    def pin(self, blocks: Iterable[int]) -> None:
        """Keep blocks from being reused; counted. Raises IntegrityError for a free block."""
        for block in blocks:
            if self.state(block) is BlockState.FREE:
                raise IntegrityError(f"pin: block {block} is free")
            self._cached.pop(block, None)
            self._pins[block] = self._pins.get(block, 0) + 1

    def unpin(self, blocks: Sequence[int]) -> None:
        """Undo one ``pin``; a block that nobody holds any more becomes cached or free."""
        loose: list[int] = []
        for block in reversed(blocks):
            count = self._pins.get(block, 0)
            if not count:
                raise IntegrityError(f"unpin: block {block} is not pinned")
            if count > 1:
                self._pins[block] = count - 1
                continue
            del self._pins[block]
            if not self._refs[block] and block not in self._reserved:
                loose.append(block)
        self._settle(loose)

    # ---- prefix cache

    def seal(self, block: int, parent: int | None, key: bytes, tokens: tuple[int, ...]) -> None:
        """Register a held, full block: KV of ``tokens`` that follow the block ``parent``.

        ``key`` is the block's chained hash, ``parent`` None for a sequence's first block.
        The block must not be written any more.
        """
        if not self._refs[block]:
            raise IntegrityError(f"seal: block {block} is {self.state(block)}")
        self.prefix.seal(block, parent, key, tokens)

    def match(self, tokens: Sequence[int], hashes: Sequence[bytes]) -> list[int]:
        """Blocks that hold the leading full blocks of ``tokens``; ``acquire`` keeps them."""
        return self.prefix.match(tokens, hashes)

    # ---- checks

    def check_integrity(self, expected_refs: Mapping[int, int] | None = None) -> None:
        """Check that each block is in exactly one state and that all counts agree.

        Args:
            expected_refs: References per block that the holders know of; blocks left out
                must have none. None skips that comparison.

        Raises:
            IntegrityError: With what is wrong.
        """
        free: set[int] = set()
        previous_end = 0
        for first, count in self._free.items():
            if first <= previous_end or count < 1 or first + count > self.num_blocks:
                raise IntegrityError(f"free run ({first}, {count}) overlaps or touches another")
            previous_end = first + count
            free.update(range(first, first + count))
        if len(free) != self._free.total:
            raise IntegrityError(f"{len(free)} free blocks, counted as {self._free.total}")
        for block in range(1, self.num_blocks):
            states = [
                name
                for name, holds in (
                    ("free", block in free),
                    ("cached", block in self._cached),
                    ("held", self._refs[block] > 0),
                    ("reserved", block in self._reserved),
                )
                if holds
            ]
            if not states and self._pins.get(block, 0) > 0:
                states = ["draining"]
            if len(states) != 1:
                raise IntegrityError(f"block {block} is {' and '.join(states) or 'lost'}")
            if block in self._pins and states[0] in ("free", "cached"):
                raise IntegrityError(f"block {block} is {states[0]} but pinned")
            if states[0] in ("free", "reserved") and self.prefix.knows(block):
                raise IntegrityError(f"block {block} is {states[0]} but the index knows it")
            if states[0] == "cached" and not self.prefix.lists(block):
                raise IntegrityError(f"block {block} is cached but not in the index")
            if expected_refs is not None and self._refs[block] != expected_refs.get(block, 0):
                raise IntegrityError(
                    f"block {block} has {self._refs[block]} references, "
                    f"its holders count {expected_refs.get(block, 0)}"
                )
        if self._refs[NULL_BLOCK] or NULL_BLOCK in self._cached or NULL_BLOCK in self._reserved:
            raise IntegrityError("the null block was handed out")
        if expected_refs and not all(0 < block < self.num_blocks for block in expected_refs):
            raise IntegrityError("a holder counts a block that is not in the pool")

    # ---- inside

    def _take(self, n: int, after: int | None) -> list[int] | None:
        if n > self.num_free:
            return None
        free = self._free
        if n > free.total:
            self._evict(n - free.total)
        blocks: list[int] = []
        if after is not None and n:
            count = min(n, free.count_at(after + 1))
            if count:
                free.carve(after + 1, 0, count)
                blocks.extend(range(after + 1, after + 1 + count))
        self._gather(n - len(blocks))
        while len(blocks) < n:
            want = n - len(blocks)
            offset = 0
            fit = free.best_fit(want)
            if fit is None:
                fit = free.largest()
            elif after is not None and want == 1:
                fit = free.largest()
                offset = fit[1] // 2
            first, count = fit[0], min(want, fit[1])
            free.carve(first, offset, count)
            blocks.extend(range(first + offset, first + offset + count))
        return blocks

    def _gather(self, n: int) -> None:
        spare = self.num_usable // _GATHER_SHARE
        while spare > 0 and self._cached and self._free.largest()[1] < n:
            count = min(spare, _GATHER_STEP, len(self._cached))
            self._evict(count)
            spare -= count

    def _evict(self, count: int) -> None:
        evicted = [self._cached.popitem(last=False)[0] for _ in range(count)]
        for block in evicted:
            self.prefix.forget(block)
        for run in runs(sorted(evicted)):
            self._free.add(*run)

    def _settle(self, blocks: list[int]) -> None:
        """Blocks that nobody holds: cached if listed, else free; later if still pinned."""
        loose: list[int] = []
        for block in blocks:
            if block in self._pins:
                continue
            if self.prefix.lists(block):
                self._cached[block] = None
            else:
                self.prefix.forget(block)
                loose.append(block)
        for run in runs(sorted(loose)):
            self._free.add(*run)
