"""Prefix hashes and the index over them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instance.kv import prefix
from instance.kv.prefix import PrefixIndex, extend_hashes, hash_block, hash_root

SIZE = 2
BLOCKS = st.sampled_from([[0, 1], [1, 0]])
TOKENS = st.lists(BLOCKS, max_size=4).map(lambda blocks: list(itertools.chain(*blocks)))


def chain(tokens: list[int], salt: bytes = b"") -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, tokens, SIZE, salt)
    return hashes


def seal_all(index: PrefixIndex, blocks: list[int], tokens: list[int]) -> None:
    parent = None
    for number, (block, key) in enumerate(zip(blocks, chain(tokens), strict=True)):
        index.seal(block, parent, key, tuple(tokens[number * SIZE : (number + 1) * SIZE]))
        parent = block


def test_hashes_are_the_same_on_every_machine() -> None:
    assert hash_root(b"model").hex() == "d4b24a65839c66d0d37c029dfbb09332"
    assert hash_block(hash_root(b"model"), [1, 2, 70000]).hex() == (
        "aa7be070498008399e1925611d303129"
    )


@given(st.lists(st.integers(0, 2**31), max_size=20), st.integers(0, 20))
def test_extending_in_parts_equals_extending_at_once(tokens: list[int], cut: int) -> None:
    hashes = chain(tokens[:cut])
    extend_hashes(hashes, tokens, SIZE, b"")
    assert hashes == chain(tokens)
    assert len(hashes) == len(tokens) // SIZE


def test_hashes_tell_salt_order_and_history_apart() -> None:
    seen = [
        chain(tokens, salt)[-1]
        for salt in (b"", b"a", b"b")
        for length in (2, 4)
        for tokens in map(list, itertools.product((0, 1, 256), repeat=length))
    ]
    assert len(set(seen)) == len(seen)


def test_a_match_ends_at_the_first_difference() -> None:
    index = PrefixIndex(SIZE)
    seal_all(index, [7, 3, 5], [1, 2, 3, 4, 5, 6])
    for tokens, blocks in (
        ([1, 2, 3, 4, 5, 6], [7, 3, 5]),
        ([1, 2, 3, 4, 5], [7, 3]),
        ([1, 2, 9, 4, 5, 6], [7]),
        ([3, 4, 5, 6], []),
    ):
        assert index.match(tokens, chain(tokens)) == blocks
    assert index.match([1, 2, 3, 4], chain([1, 2, 3, 4])[:1]) == [7]


def test_equal_content_is_listed_once_and_still_is_a_parent() -> None:
    index = PrefixIndex(SIZE)
    seal_all(index, [1, 2], [0, 0, 0, 1])
    seal_all(index, [3, 4, 5], [0, 0, 0, 1, 1, 1])
    assert [index.lists(block) for block in (1, 2, 3, 4, 5)] == [True, True, False, False, True]
    assert index.match([0, 0, 0, 1, 1, 1], chain([0, 0, 0, 1, 1, 1])) == [1, 2, 5]
    index.forget(4)
    assert index.lists(2)
    index.forget(2)
    assert index.match([0, 0, 0, 1], chain([0, 0, 0, 1])) == [1]
    assert len(index) == 2


def test_a_child_is_hit_again_when_its_parent_was_computed_anew() -> None:
    index = PrefixIndex(SIZE)
    tokens = [0, 0, 0, 1, 1, 1]
    seal_all(index, [1, 2, 3], tokens)
    index.forget(1)
    assert index.match(tokens, chain(tokens)) == []
    index.seal(9, None, chain(tokens)[0], (0, 0))
    assert index.match(tokens, chain(tokens)) == [9, 2, 3]


def test_sealing_refuses_what_is_not_a_block_in_a_chain() -> None:
    index = PrefixIndex(SIZE)
    with pytest.raises(ValueError, match="not a full block"):
        index.seal(1, None, b"k", (1,))
    with pytest.raises(ValueError, match="parent 4 is not sealed"):
        index.seal(1, 4, b"k", (1, 2))


def by_sum(previous: bytes, tokens: list[int]) -> bytes:
    return bytes([(sum(tokens) + sum(previous)) % 3])


def by_depth(previous: bytes, tokens: list[int]) -> bytes:
    return bytes([(previous[0] + 1) % 256])


def always(previous: bytes, tokens: list[int]) -> bytes:
    return b"same"


@pytest.mark.parametrize("collide", [by_sum, by_depth, always])
def test_colliding_hashes_never_give_a_wrong_hit(
    monkeypatch: pytest.MonkeyPatch, collide: Callable[[bytes, list[int]], bytes]
) -> None:
    monkeypatch.setattr(prefix, "hash_block", collide)
    hits = 0

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.tuples(TOKENS, st.integers(0, 6)), max_size=12))
    def explore(history: list[tuple[list[int], int]]) -> None:
        nonlocal hits
        index = PrefixIndex(SIZE)
        content: dict[int, list[int]] = {}
        fresh = itertools.count(1)
        for tokens, forgotten in history:
            matched = index.match(tokens, chain(tokens))
            hits += len(matched)
            for number, block in enumerate(matched):
                assert content[block] == tokens[: (number + 1) * SIZE]
            blocks = matched + [next(fresh) for _ in range(len(tokens) // SIZE - len(matched))]
            seal_all(index, blocks, tokens)
            for number, block in enumerate(blocks):
                content[block] = tokens[: (number + 1) * SIZE]
            # Evicted in any order, so that children outlive their parents.
            for block in list(content)[forgotten : forgotten + 2]:
                index.forget(block)
                del content[block]

    explore()
    assert hits > 0


def test_a_collision_does_not_adopt_another_ones_children(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefix, "hash_block", by_depth)
    index = PrefixIndex(SIZE)
    seal_all(index, [1, 2], [0, 1, 5, 5])
    seal_all(index, [3, 4, 5], [1, 0, 5, 5, 6, 6])
    for tokens, blocks in (
        ([0, 1, 5, 5, 6, 6], [1, 2]),
        ([1, 0, 5, 5, 6, 6], []),
    ):
        assert index.match(tokens, chain(tokens)) == blocks
