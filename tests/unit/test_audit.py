"""The log of changes: bounded, newest first, and kept over a restart."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.dispatcher.audit import AuditLog, Change

changes = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12)


def log(values: list[tuple[int, int]], size: int = 5, since: float = 0.0) -> AuditLog:
    made = AuditLog(size)
    for number, (before, after) in enumerate(values):
        made.note(Change(since + number, "ann", "placement", before, after))
    return made


@given(changes)
def test_the_latest_real_changes_are_kept(values: list[tuple[int, int]]) -> None:
    real = [number for number, (before, after) in enumerate(values) if before != after]
    kept = [int(one["time"]) for one in log(values).export()]
    assert kept == real[::-1][:5]


@given(changes, changes)
def test_an_earlier_life_comes_behind_and_only_once(
    old: list[tuple[int, int]], new: list[tuple[int, int]]
) -> None:
    stored = json.loads(json.dumps(log(old).export()))
    own = log(new, since=100.0)
    before = own.export()
    for _ in range(2):
        own.restore(stored)
        assert own.export() == (before + stored)[:5]


@pytest.mark.parametrize("stored", [None, 3, {"a": 1}, [1], [{"time": 1}], [{"more": 1}]])
def test_a_damaged_log_is_left_out(stored: Any) -> None:
    own = log([(0, 1)])
    before = own.export()
    own.restore(stored)
    assert own.export() == before
