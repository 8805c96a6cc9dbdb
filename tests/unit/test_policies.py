"""Policies in force, changed at run time, tried out, and those of the user's own."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.dispatcher.core import Dispatcher, DispatcherConfig
from cluster.dispatcher.events import Joined, PlaceRequested, Reported, Tick
from cluster.dispatcher.overrides import POLICY, key
from cluster.dispatcher.placement import NamedPolicy
from cluster.dispatcher.policies import EvenSequence, PolicyFailed
from cluster.dispatcher.views import LoadView
from cluster.flags import ConfigError
from cluster.user_policy import (
    FileRefused,
    GuardedPolicy,
    file_policies,
    is_file_policy,
    permitted,
)
from cluster.values import placement_policy
from tests.unit.dispatching import ask, dispatcher, info, placed, report, sequence

NAMES = ("i0", "i1", "i2")


def join(core: Dispatcher, **loads: int) -> Dispatcher:
    for name in NAMES:
        core.handle(Joined(info(name)), 0.0)
        held = tuple(sequence(f"{name}.{n}", 20) for n in range(loads.get(name, 0)))
        core.handle(Reported(report(name, 1, held)), 0.0)
    return core


def with_policy(choose) -> Dispatcher:
    config = DispatcherConfig(placement="mine")
    return join(Dispatcher(config, random.Random(0), 1, {"mine": NamedPolicy(choose)}))


def place(core: Dispatcher, name: str) -> str:
    (chosen,) = placed(core.handle(PlaceRequested(ask(name)), 0.1))
    return chosen


# ---- a policy of the user's


def test_a_policy_of_the_users_decides() -> None:
    core = with_policy(lambda request, candidates, rng: candidates[2])
    assert {place(core, f"r{n}") for n in range(3)} == {"i2"}
    assert not core.counters["policy_fallbacks"]


@pytest.mark.parametrize("answer", [None, "i1", 7, ()])
def test_nonsense_falls_back_to_freeness_and_is_counted(answer) -> None:
    core = with_policy(lambda request, candidates, rng: answer)
    assert place(core, "r") == "i0"
    assert core.counters["policy_fallbacks"] == {"nonsense": 1}


def test_an_instance_that_is_not_offered_is_nonsense() -> None:
    seen: list[LoadView] = []

    def choose(request, candidates, rng):
        seen.extend(candidates)
        return seen[0]

    core = with_policy(choose)
    assert place(core, "r") == "i0"
    avoiding = PlaceRequested(ask("other", avoid=("i0",)))
    assert placed(core.handle(avoiding, 0.1)) != ["i0"]
    assert core.counters["policy_fallbacks"] == {"nonsense": 1}


def test_one_that_raises_falls_back() -> None:
    def choose(request, candidates, rng):
        raise ZeroDivisionError

    core = with_policy(choose)
    assert place(core, "r") == "i0"
    assert core.counters["policy_fallbacks"] == {"raised": 1}


# ---- the guard


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def candidates_of(core: Dispatcher):
    found = core.members.candidates(ask("r"), 0.1)
    assert found is not None
    return found


def test_the_guard_takes_views_and_names() -> None:
    core = join(dispatcher())
    offered = candidates_of(core)

    def by_name(request, views, cached):
        assert cached == [0, 0, 0]
        return views[1].instance_id

    guard = GuardedPolicy("mine", by_name, limit=60.0)
    assert guard(ask("r"), offered, random.Random(0)).instance_id == "i1"
    guard = GuardedPolicy("mine", lambda request, views, cached: views[2], limit=60.0)
    assert guard(ask("r"), offered, random.Random(0)).instance_id == "i2"


def test_the_guard_names_what_went_wrong() -> None:
    offered = candidates_of(join(dispatcher()))
    raising = GuardedPolicy("mine", lambda request, views, cached: 1 / 0, limit=60.0)
    with pytest.raises(PolicyFailed, match="raised"):
        raising(ask("r"), offered, random.Random(0))
    foolish = GuardedPolicy("mine", lambda request, views, cached: "i9", limit=60.0)
    with pytest.raises(PolicyFailed, match="nonsense"):
        foolish(ask("r"), offered, random.Random(0))


def test_one_that_hangs_is_given_up_rests_and_is_asked_again() -> None:
    offered = candidates_of(join(dispatcher()))
    clock, release, calls = Clock(), threading.Event(), []

    def slow(request, views, cached):
        calls.append(threading.current_thread())
        if len(calls) == 1:
            release.wait()
        return views[0]

    guard = GuardedPolicy("mine", slow, limit=0.05, rest=5.0, clock=clock)
    with pytest.raises(PolicyFailed, match="late"):
        guard(ask("r"), offered, random.Random(0))
    with pytest.raises(PolicyFailed, match="rests"):
        guard(ask("r"), offered, random.Random(0))
    clock.now = 5.0
    release.set()
    guard._limit = 60.0
    assert guard(ask("r"), offered, random.Random(0)).instance_id == "i0"
    assert len(calls) == 2
    calls[0].join(60.0)
    assert not calls[0].is_alive()


def test_an_endless_loop_ends_once_nobody_waits_for_it() -> None:
    offered = candidates_of(join(dispatcher()))
    threads = []

    def endless(request, views, cached):
        threads.append(threading.current_thread())
        while True:
            pass

    guard = GuardedPolicy("mine", endless, limit=0.05)
    with pytest.raises(PolicyFailed, match="late"):
        guard(ask("r"), offered, random.Random(0))
    if threads:
        threads[0].join(60.0)
        assert not threads[0].is_alive()


def test_files_are_read_anew_and_faults_are_said(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    name = f"{file}:choose"
    assert is_file_policy(name)
    assert not is_file_policy("freeness")
    with pytest.raises(ConfigError, match="there is no file"):
        placement_policy(name)
    offered = candidates_of(join(dispatcher()))
    for index in (1, 2):
        file.write_text(f"def choose(request, views, cached):\n    return views[{index}]\n")
        assert placement_policy(name) == name
        policy = file_policies(name, "freeness")[name]
        assert isinstance(policy.choose, GuardedPolicy)
        policy.choose._limit = 60.0
        chosen = policy.choose(ask("r"), offered, random.Random(0))
        assert chosen.instance_id == f"i{index}"
    file.write_text("raise KeyError('no')\n")
    with pytest.raises(ConfigError, match="raises KeyError"):
        placement_policy(name)
    file.write_text("other = 1\n")
    with pytest.raises(ConfigError, match="has no function 'choose'"):
        placement_policy(name)
    with pytest.raises(ConfigError, match="is not one of"):
        placement_policy("best")


def test_only_files_below_the_folder_are_permitted(tmp_path: Path) -> None:
    folder = tmp_path / "policies"
    (folder / "more").mkdir(parents=True)
    for file in (folder / "mine.py", folder / "more" / "other.py", tmp_path / "policies.py"):
        file.touch()
    (folder / "out.py").symlink_to(tmp_path / "policies.py")
    (folder / "away").symlink_to(tmp_path)
    (folder / "circle.py").symlink_to(folder / "circle.py")
    (tmp_path / "link").symlink_to(folder)
    mine = f"{folder.resolve() / 'mine.py'}:choose"
    for name in (
        "mine.py:choose",
        "./more/../mine.py:choose",
        f"{folder}/mine.py:choose",
        f"{tmp_path}/link/mine.py:choose",
    ):
        assert permitted(name, str(folder)) == mine
        assert permitted(name, str(tmp_path / "link")) == mine
    assert permitted("more/other.py:f", str(folder)).endswith("/policies/more/other.py:f")
    for name in (
        "../policies.py:f",
        f"{tmp_path}/policies.py:f",
        "/etc/nothing.py:f",
        "out.py:f",
        "away/policies.py:f",
        "more/../../policies.py:f",
        "circle.py:f",
        f"{folder}-too/mine.py:f",
    ):
        with pytest.raises(FileRefused, match="not in the folder of --policy-dir"):
            permitted(name, str(folder))
        with pytest.raises(FileRefused, match="started with --policy-dir"):
            permitted(name, "")
    with pytest.raises(ValueError, match="null"):
        permitted("a\0b.py:f", str(folder))


@given(st.lists(st.sampled_from(["..", ".", "a", "b", "a.py", ""]), max_size=8))
def test_what_is_permitted_is_below_the_folder(parts: list[str]) -> None:
    path = "/".join([*parts, "x.py"])
    try:
        name = permitted(f"{path}:f", "/nowhere/policies")
    except FileRefused:
        depth = low = 0
        for part in parts:
            depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
            low = min(low, depth)
        assert path.startswith("/") or low < 0
        return
    assert name.startswith("/nowhere/policies/")
    assert ".." not in Path(name).parts


# ---- changes


def test_policies_change_at_run_time_and_survive_a_restart() -> None:
    core = join(dispatcher())
    assert core.set_policies({"placement": "llumnix", "rebalance": False}) == {
        "placement": "llumnix",
        "rebalance": False,
        "rules": "llumnix",
        "late_binding": False,
    }
    assert core.overrides.get(key(POLICY, "placement")) == "llumnix"
    again = dispatcher()
    again.restore_state(core.export_state(0.1), 0.0)
    assert again.policies.settings() == core.policies.settings()
    assert not again.placing.late_binding


@pytest.mark.parametrize(
    "changes", [{"placement": "best"}, {"rebalance": 1}, {"speed": 3}, {"placement": None}]
)
def test_a_bad_change_changes_nothing(changes) -> None:
    core = join(dispatcher())
    before = core.policies.settings()
    with pytest.raises(ValueError, match=r"."):
        core.set_policies({"rebalance": False, **changes})
    assert core.policies.settings() == before


def test_a_dry_run_says_what_would_be_decided_and_changes_nothing() -> None:
    core = join(dispatcher(placement="round_robin"), i0=8)
    for number in range(6):
        place(core, f"r{number}")
    before = core.export_state(0.2), core.policies.settings(), core.counters["placements"].copy()
    told = core.dry_run({"placement": "freeness"}, 0.2)
    assert told["requests"] == 6
    assert told["instances"].get("i0", 0) == 0
    assert sum(told["instances"].values()) == 6
    assert {d["chosen"] for d in told["decisions"]} == set(NAMES)
    assert all(d["would"] != "i0" for d in told["decisions"])
    assert (core.export_state(0.2), core.policies.settings()) == before[:2]
    assert core.counters["placements"] == before[2]


def test_a_dry_run_shows_the_moves_that_would_start() -> None:
    core = join(dispatcher(), i0=40)
    off = core.dry_run({"rebalance": False}, 0.2)
    assert off["moves"] == []
    on = core.dry_run({}, 0.2)
    assert {move["source"] for move in on["moves"]} == {"i0"}
    assert core.members.transfers == {}
    assert core.handle(Tick(), 0.3)


def test_numbers_for_dry_runs_cover_the_interval_evenly() -> None:
    draws = EvenSequence()
    found = [draws.random() for _ in range(64)]
    assert all(0 <= value < 1 for value in found)
    for low in range(8):
        inside = [value for value in found if low / 8 <= value < (low + 1) / 8]
        assert abs(len(inside) - 8) <= 1
