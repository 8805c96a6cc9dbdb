"""The block pool, directly and against a naive model."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from instance.kv.blocks import BlockPool, BlockState, Fragmentation, IntegrityError
from instance.kv.prefix import extend_hashes
from instance.kv.runs import FreeRuns, runs

SIZE = 2


def taken(pool: BlockPool, n: int, after: int | None = None) -> list[int]:
    blocks = pool.allocate(n, after)
    assert blocks is not None
    return blocks


def seal(pool: BlockPool, blocks: list[int], tokens: list[int]) -> None:
    hashes: list[bytes] = []
    extend_hashes(hashes, tokens, SIZE, b"")
    for number, (block, key) in enumerate(zip(blocks, hashes, strict=True)):
        parent = blocks[number - 1] if number else None
        pool.seal(block, parent, key, tuple(tokens[number * SIZE : (number + 1) * SIZE]))


def hit(pool: BlockPool, tokens: list[int]) -> list[int]:
    hashes: list[bytes] = []
    extend_hashes(hashes, tokens, SIZE, b"")
    return pool.match(tokens, hashes)


# ---- runs


@given(st.lists(st.integers(1, 30)))
def test_runs_cover_a_block_list_in_order(blocks: list[int]) -> None:
    found = runs(blocks)
    assert [first + step for first, count in found for step in range(count)] == blocks
    assert all(a + n != b for (a, n), (b, _) in itertools.pairwise(found))


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), max_size=60))
def test_free_runs_merge_and_split(operations: list[tuple[int, int]]) -> None:
    free = FreeRuns()
    model: set[int] = set()
    for number, extra in operations:
        if number not in model:
            free.add(number, 1)
            model.add(number)
        else:
            first, count = next(run for run in free.items() if run[0] <= number < sum(run))
            length = min(1 + extra, first + count - number)
            free.carve(first, number - first, length)
            model -= set(range(number, number + length))
        expected = runs(sorted(model))
        assert free.items() == expected
        assert (free.total, len(free)) == (len(model), len(expected))
        assert free.largest()[1] == max((count for _, count in expected), default=0)
        fitting = [count for _, count in expected if count >= number]
        fit = free.best_fit(number)
        assert (fit[1] if fit else None) == min(fitting, default=None)


# ---- direct


def test_the_null_block_is_never_handed_out() -> None:
    pool = BlockPool(5, SIZE)
    assert (pool.num_usable, pool.num_free) == (4, 4)
    assert sorted(taken(pool, 4)) == [1, 2, 3, 4]
    assert pool.allocate(1) is None
    for use in (pool.acquire, pool.release, pool.pin, pool.unpin, pool.commit):
        with pytest.raises(IntegrityError):
            use([0])
    pool.check_integrity(dict.fromkeys(range(1, 5), 1))


@pytest.mark.parametrize(("num_blocks", "block_size"), [(1, 4), (0, 4), (8, 0)])
def test_a_pool_without_room_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="no pool"):
        BlockPool(num_blocks, block_size)


def test_best_fit_takes_the_smallest_run_that_holds_all() -> None:
    pool = BlockPool(21, SIZE)
    blocks = taken(pool, 20)
    pool.release(blocks[1:7])  # 2..7
    pool.release(blocks[9:13])  # 10..13
    pool.release(blocks[15:18])  # 16..18
    assert taken(pool, 4) == [10, 11, 12, 13]
    assert taken(pool, 2) == [16, 17]
    assert taken(pool, 5) == [2, 3, 4, 5, 6]
    # Two single blocks are left: it still works block by block.
    assert sorted(taken(pool, 2)) == [7, 18]
    assert pool.allocate(1) is None


def test_a_sequence_grows_in_place_where_it_can() -> None:
    pool = BlockPool(33, SIZE)
    first, second = taken(pool, 4), taken(pool, 4)
    assert runs(first + second) == [(1, 8)]
    # The next block is the neighbour's, so growth goes where there is room to go on.
    for _ in range(6):
        first += taken(pool, 1, after=first[-1])
        second += taken(pool, 1, after=second[-1])
    assert len(runs(first)) == 2
    assert len(runs(second)) == 1
    pool.release(first)
    pool.release(second)
    assert pool.fragmentation().largest_run == pool.fragmentation().free == 32
    assert pool.fragmentation().runs == 1


def test_growth_continues_elsewhere_when_the_run_ends() -> None:
    pool = BlockPool(12, SIZE)
    blocks = taken(pool, 3)
    wall = taken(pool, 2)
    pool.release([wall[0]])
    assert taken(pool, 3, after=blocks[-1]) == [4, 6, 7]


def test_released_content_is_kept_and_the_tail_is_evicted_first() -> None:
    pool = BlockPool(6, SIZE)
    tokens = [1, 2, 3, 4, 5, 6]
    blocks = taken(pool, 3)
    seal(pool, blocks, tokens)
    pool.release(blocks)
    assert (pool.num_free, pool.num_cached) == (5, 3)
    assert hit(pool, tokens) == blocks
    assert pool.num_idle(blocks) == 3
    taken(pool, 3)
    assert hit(pool, tokens) == blocks[:2]
    pool.acquire(blocks[:2])
    assert pool.num_free == 0
    assert pool.allocate(1) is None
    pool.check_integrity()


def test_cached_blocks_are_reused_least_recently_released_first() -> None:
    pool = BlockPool(5, SIZE)
    old, young = taken(pool, 2), taken(pool, 2)
    seal(pool, old, [1, 1, 1, 1])
    seal(pool, young, [2, 2, 2, 2])
    pool.release(young)
    pool.release(old)
    pool.acquire(hit(pool, [2, 2]))
    pool.release(young[:1])
    assert taken(pool, 1) == [young[1]]
    assert taken(pool, 1) == [old[1]]
    assert taken(pool, 1) == [old[0]]
    assert taken(pool, 1) == [young[0]]


def test_a_little_of_the_cache_is_given_for_one_run() -> None:
    pool = BlockPool(257, SIZE)
    blocks = taken(pool, 256)
    tokens = [number % 7 for number in range(200 * SIZE)]
    seal(pool, blocks[:200], tokens)
    pool.release(blocks[:200])
    pool.release(blocks[201::2])
    assert pool.fragmentation() == Fragmentation(free=28, runs=28, largest_run=1)
    # A single block needs no run, and takes nothing from the cache.
    assert len(taken(pool, 1)) == 1
    assert len(hit(pool, tokens)) == 200
    assert len(runs(taken(pool, 6))) == 1
    assert len(hit(pool, tokens)) == 192
    # Not more than a small share of the pool, though: then it is several runs.
    assert len(runs(taken(pool, 20))) > 1
    assert len(hit(pool, tokens)) == 184


def test_a_pinned_block_outlives_its_sequence() -> None:
    pool = BlockPool(4, SIZE)
    blocks = taken(pool, 3)
    seal(pool, blocks[:1], [1, 2])
    pool.pin(blocks[:2])
    pool.pin(blocks[:2])
    pool.release(blocks)
    assert [pool.state(block) for block in blocks] == ["draining", "draining", "free"]
    assert (pool.num_free, pool.num_draining) == (1, 2)
    assert pool.allocate(2) is None
    pool.unpin(blocks[:2])
    assert pool.num_draining == 2
    # Draining content can be hit and held again.
    pool.acquire(hit(pool, [1, 2]))
    pool.unpin(blocks[:2])
    assert [pool.state(block) for block in blocks] == ["held", "free", "free"]
    pool.release(blocks[:1])
    assert pool.state(blocks[0]) is BlockState.CACHED
    pool.pin(blocks[:1])
    assert pool.allocate(3) is None
    pool.unpin(blocks[:1])
    assert len(taken(pool, 3)) == 3


def test_a_reservation_is_committed_or_released() -> None:
    pool = BlockPool(8, SIZE)
    blocks = pool.reserve(4)
    assert blocks is not None
    assert (pool.num_free, pool.num_reserved) == (3, 4)
    pool.check_integrity({})
    pool.pin(blocks[2:])
    pool.commit(blocks[:2])
    pool.release(blocks[2:])
    assert [pool.state(block) for block in blocks] == ["held", "held", "draining", "draining"]
    pool.check_integrity(dict.fromkeys(blocks[:2], 1))
    pool.unpin(blocks[2:])
    pool.release(blocks[:2])
    assert pool.num_free == 7
    assert pool.reserve(8) is None


MISUSE: list[tuple[str, Callable[[BlockPool, int], object]]] = [
    ("release", lambda pool, block: pool.release([block])),
    ("acquire", lambda pool, block: pool.acquire([block])),
    ("commit", lambda pool, block: pool.commit([block])),
    ("pin", lambda pool, block: pool.pin([block])),
    ("unpin", lambda pool, block: pool.unpin([block])),
    ("seal", lambda pool, block: pool.seal(block, None, b"", (1, 2))),
]


@pytest.mark.parametrize(("name", "use"), MISUSE)
def test_a_free_block_cannot_be_used(name: str, use: Callable[[BlockPool, int], object]) -> None:
    pool = BlockPool(4, SIZE)
    with pytest.raises(IntegrityError, match=name):
        use(pool, 2)
    pool.check_integrity({})


def leak_a_reference(pool: BlockPool) -> None:
    pool._refs[3] += 1


def lose_a_block(pool: BlockPool) -> None:
    pool._free.carve(6, 0, 1)


def cache_without_content(pool: BlockPool) -> None:
    pool._free.carve(6, 0, 1)
    pool._cached[6] = None


def keep_what_is_free(pool: BlockPool) -> None:
    pool._reserved.add(6)


def pin_what_is_free(pool: BlockPool) -> None:
    pool._pins[6] = 1


def miscount(pool: BlockPool) -> None:
    pool._free.total += 1


def hand_out_the_null_block(pool: BlockPool) -> None:
    pool._refs[0] = 1


def forget_cached_content(pool: BlockPool) -> None:
    pool.prefix.forget(2)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (leak_a_reference, "block 3 has 2 references, its holders count 1"),
        (lose_a_block, "block 6 is lost"),
        (cache_without_content, "block 6 is cached but not in the index"),
        (keep_what_is_free, "block 6 is free and reserved"),
        (pin_what_is_free, "block 6 is free but pinned"),
        (miscount, "counted as"),
        (hand_out_the_null_block, "null block"),
        (forget_cached_content, "block 2 is cached but not in the index"),
    ],
)
def test_the_check_finds_broken_books(spoil: Callable[[BlockPool], None], complaint: str) -> None:
    pool = BlockPool(8, SIZE)
    blocks = taken(pool, 5)
    seal(pool, blocks, list(range(10)))
    pool.release(blocks[:2])
    refs = dict.fromkeys(blocks[2:], 1)
    pool.check_integrity(refs)
    spoil(pool)
    with pytest.raises(IntegrityError, match=complaint):
        pool.check_integrity(refs)


def test_the_check_wants_the_holders_counts_to_agree() -> None:
    pool = BlockPool(8, SIZE)
    (block,) = taken(pool, 1)
    for refs in ({}, {block: 2}, {block: 1, 6: 1}, {block: 1, 99: 1}):
        with pytest.raises(IntegrityError):
            pool.check_integrity(refs)


# ---- against a naive model


class Group:
    """A holder: blocks of one sequence, the tokens of those sealed, reserved or held."""

    def __init__(self, blocks: list[int], tokens: list[int] | None = None) -> None:
        self.blocks = blocks
        self.tokens = tokens or []


Content = tuple[int, ...]


class PoolMachine(RuleBasedStateMachine):
    """Every operation, mirrored by sets and counters."""

    held = Bundle("held")
    reserved = Bundle("reserved")
    pinned = Bundle("pinned")

    @initialize(num_blocks=st.integers(2, 24))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, SIZE)
        self.all = set(range(1, num_blocks))
        self.refs: Counter[int] = Counter()
        self.pins: Counter[int] = Counter()
        self.promised: set[int] = set()
        self.listed: dict[Content, int] = {}
        self.content: dict[int, Content] = {}
        self.cached: list[int] = []

    def free(self) -> set[int]:
        return {
            block
            for block in self.all
            if not self.refs[block]
            and not self.pins[block]
            and block not in self.promised
            and block not in self.cached
        }

    def forget(self, block: int) -> None:
        content = self.content.pop(block, None)
        if content is not None and self.listed.get(content) == block:
            del self.listed[content]

    def settle(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            if self.refs[block] or self.pins[block] or block in self.promised:
                continue
            if self.listed.get(self.content.get(block, ())) == block:
                if block not in self.cached:
                    self.cached.append(block)
            else:
                self.forget(block)

    def taken(self, n: int, after: int | None, blocks: list[int] | None) -> list[int]:
        """Check what was handed out against the model, and take over evictions."""
        free = self.free()
        if blocks is None:
            assert n > len(free) + len(self.cached)
            return []
        assert len(blocks) == len(set(blocks)) == n
        gone = [block for block in self.cached if not self.pool.prefix.lists(block)]
        assert gone == self.cached[: len(gone)], "evicted, but not the least recently released"
        assert bool(gone) == (n > len(free)), "evicted without need"
        assert set(blocks) <= free | set(gone)
        del self.cached[: len(gone)]
        for block in gone:
            self.forget(block)
        room = free | set(gone)
        longest = max((count for _, count in runs(sorted(room))), default=0)
        if after is not None and after + 1 in room and n:
            assert blocks[0] == after + 1
        elif n <= longest:
            assert len(runs(blocks)) == min(n, 1)
        if after is not None and {after + 1 + step for step in range(n)} <= room:
            assert runs([after, *blocks]) == [(after, n + 1)]
        return blocks

    @rule(target=held, n=st.integers(0, 8))
    def allocate(self, n: int) -> object:
        blocks = self.taken(n, None, self.pool.allocate(n))
        self.refs.update(blocks)
        return Group(blocks) if blocks else multiple()

    @rule(group=held, n=st.integers(1, 3))
    def grow(self, group: Group, n: int) -> None:
        if group.blocks:
            after = group.blocks[-1]
            blocks = self.taken(n, after, self.pool.allocate(n, after))
            self.refs.update(blocks)
            group.blocks.extend(blocks)

    @rule(target=held, tokens=st.lists(st.integers(0, 1), max_size=10))
    def hit(self, tokens: list[int]) -> object:
        hashes: list[bytes] = []
        extend_hashes(hashes, tokens, SIZE, b"")
        expected: list[int] = []
        for end in range(SIZE, len(tokens) + 1, SIZE):
            if tuple(tokens[:end]) not in self.listed:
                break
            expected.append(self.listed[tuple(tokens[:end])])
        blocks = self.pool.match(tokens, hashes)
        assert blocks == expected
        assert self.pool.num_idle(blocks) == sum(block in self.cached for block in blocks)
        self.pool.acquire(blocks)
        self.refs.update(blocks)
        self.cached = [block for block in self.cached if block not in blocks]
        return Group(blocks, tokens[: len(blocks) * SIZE]) if blocks else multiple()

    @rule(group=held, tokens=st.lists(st.integers(0, 1), min_size=SIZE, max_size=SIZE))
    def seal(self, group: Group, tokens: list[int]) -> None:
        index = len(group.tokens) // SIZE
        if index >= len(group.blocks):
            return
        block = group.blocks[index]
        group.tokens.extend(tokens)
        hashes: list[bytes] = []
        extend_hashes(hashes, group.tokens, SIZE, b"")
        parent = group.blocks[index - 1] if index else None
        self.pool.seal(block, parent, hashes[index], tuple(tokens))
        self.content[block] = tuple(group.tokens)
        self.listed.setdefault(self.content[block], block)

    @rule(group=consumes(held))
    def release(self, group: Group) -> None:
        self.pool.release(group.blocks)
        self.refs.subtract(group.blocks)
        self.settle(group.blocks)
        group.blocks = []

    @rule(target=reserved, n=st.integers(1, 6))
    def reserve(self, n: int) -> object:
        blocks = self.taken(n, None, self.pool.reserve(n))
        self.promised.update(blocks)
        return Group(blocks) if blocks else multiple()

    @rule(target=held, group=consumes(reserved))
    def commit(self, group: Group) -> Group:
        self.pool.commit(group.blocks)
        self.promised.difference_update(group.blocks)
        self.refs.update(group.blocks)
        return group

    @rule(group=consumes(reserved))
    def cancel(self, group: Group) -> None:
        self.pool.release(group.blocks)
        self.promised.difference_update(group.blocks)
        self.settle(group.blocks)

    @rule(target=pinned, group=st.one_of(held, reserved))
    def pin(self, group: Group) -> object:
        blocks = list(group.blocks)
        self.pool.pin(blocks)
        self.pins.update(blocks)
        return blocks or multiple()

    @rule(target=pinned)
    def pin_cached(self) -> object:
        blocks = self.cached[:2]
        self.pool.pin(blocks)
        self.pins.update(blocks)
        self.cached = self.cached[2:]
        return blocks or multiple()

    @rule(blocks=consumes(pinned))
    def unpin(self, blocks: list[int]) -> None:
        self.pool.unpin(blocks)
        self.pins.subtract(blocks)
        self.settle(blocks)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "pool"):
            return
        pool, free = self.pool, self.free()
        pool.check_integrity(+self.refs)
        for block in self.all:
            expected = (
                BlockState.HELD
                if self.refs[block]
                else BlockState.RESERVED
                if block in self.promised
                else BlockState.DRAINING
                if self.pins[block]
                else BlockState.CACHED
                if block in self.cached
                else BlockState.FREE
            )
            assert pool.state(block) is expected
            assert pool.num_references(block) == self.refs[block]
        assert pool.num_free == len(free) + len(self.cached)
        assert pool.num_cached == len(self.cached)
        assert pool.num_reserved == len(self.promised)
        figures = pool.fragmentation()
        assert (figures.free, figures.runs) == (len(free), len(runs(sorted(free))))


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
