"""Operators' settings: the newest value of a key holds, in whatever order values meet."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cluster.dispatcher.overrides import Overrides, key

names = st.sampled_from(["a", "b", "draining/i0", "draining/i1"])
values = st.one_of(st.none(), st.booleans(), st.integers(0, 3), st.just({"w": 2}))
writes = st.lists(st.tuples(st.integers(0, 2), names, values), max_size=12)


def made(steps: list[tuple[int, str, Any]]) -> list[Overrides]:
    """Three lives, which begin at different versions and write what they are told."""
    lives = [Overrides(10), Overrides(13), Overrides(1000)]
    for life, name, value in steps:
        lives[life].set(name, value)
    return lives


@given(writes, st.permutations(range(3)), st.integers(0, 2))
def test_merging_in_any_order_gives_the_newest(
    steps: list[tuple[int, str, Any]], order: list[int], again: int
) -> None:
    exports = [json.loads(json.dumps(one.export())) for one in made(steps)]
    merged = Overrides(0)
    for index in (*order, again):
        merged.merge(exports[index])
    newest: dict[str, tuple[int, Any]] = {}
    for export in exports:
        for name, (version, value) in export.items():
            if version > newest.get(name, (-1,))[0]:
                newest[name] = version, value
    # Two lives may give one version to different values; then either may hold.
    versions = [(n, v) for export in exports for n, (v, _) in export.items()]
    for name, (version, value) in newest.items():
        if versions.count((name, version)) == 1:
            assert merged.get(name) == value
    assert {name: entry[0] for name, entry in merged.export().items()} == {
        name: version for name, (version, _) in newest.items()
    }


@given(writes, names, values)
def test_what_is_set_after_a_merge_is_newest(
    steps: list[tuple[int, str, Any]], name: str, value: Any
) -> None:
    for other in made(steps):
        here = Overrides(1)
        here.merge(other.export())
        here.set(name, value)
        before = here.export()
        assert here.merge(other.export()) == []
        assert here.export() == before
        changed = [name] if other.get(name) != value else []
        assert other.merge(before) == changed
        assert other.get(name) == value


def test_kinds_of_keys() -> None:
    overrides = Overrides(1)
    overrides.set(key("draining", "i/0"), True)
    overrides.set(key("draining", "i1"), None)
    overrides.set("draining", 1)
    overrides.set(key("role", "i0"), "decode")
    assert list(overrides.items("draining")) == [("i/0", True)]
    assert overrides.get("nothing") is None


def test_what_is_no_export_is_left_out() -> None:
    overrides = Overrides(1)
    assert overrides.merge({"a": 1, "b": ["x", 2], "c": [1], "d": [-1, 2], "e": [2, 3]}) == ["e"]
    assert overrides.export() == {"e": [2, 3]}
