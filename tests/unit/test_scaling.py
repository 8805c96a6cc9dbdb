"""How many instances there should be."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import tables
from cluster.config import ServeConfig
from cluster.dispatcher.events import Joined, Reported, ScalingEnded, Tick
from cluster.dispatcher.load import InstanceLoad, LoadConfig
from cluster.dispatcher.scaling import (
    START,
    STOP,
    Scaler,
    ScalingConfig,
    cluster_freeness,
    shortage,
)
from cluster.dispatcher.views import InstanceState, LoadView
from cluster.flags import ConfigError
from cluster.values import role_count
from instance.load import Role
from tests.unit.dispatching import dispatcher, info, report, sequence

BLOCKS = 200
CONFIG = ScalingConfig(
    min_instances=1, max_instances=6, period=2.0, cooldown=4.0, start_timeout=8.0
)


def view(name: str, requests: int, role: Role = Role.MIXED, state=InstanceState.READY) -> LoadView:
    load = InstanceLoad(info(name, blocks=BLOCKS), 0.0)
    held = tuple(sequence(f"{name}.{n}", 10) for n in range(requests))
    load.accept(report(name, 1, held, blocks=BLOCKS), 0.0)
    return load.view(0.0, LoadConfig())._replace(role=role, state=state)


@dataclass
class Fleet:
    """Runs what a scaler orders; load is spread evenly over what does not leave."""

    scaler: Scaler
    names: set[str]
    load: int = 0
    works: bool = True
    now: float = 0.0
    left: dict[str, int] = field(default_factory=dict)
    starting: set[str] = field(default_factory=set)
    history: list[int] = field(default_factory=list)

    def views(self) -> list[LoadView]:
        staying = sorted(self.names - self.scaler.leaving)
        found = []
        for place, name in enumerate(staying):
            share = self.load // len(staying) + (place < self.load % len(staying))
            found.append(view(name, share))
        for name in sorted(self.scaler.leaving & self.names):
            found.append(view(name, self.left.get(name, 0), state=InstanceState.DRAINING))
        return found

    def step(self, seconds: float = 1.0) -> None:
        self.now += seconds
        for name in self.scaler.leaving & self.names:
            self.left[name] = max(0, self.left.get(name, 3) - 1)
        empty = {name: self.left.get(name) == 0 for name in self.scaler.leaving}
        taken = self.names.__contains__
        self.scaler.update(self.views(), empty, 0, taken, self.now)
        for name, what in self.scaler.orders().items():
            if what == STOP:
                self.names.discard(name)
                self.left.pop(name, None)
                self.scaler.ended(name, "stopped", self.now)
            elif self.works:
                self.names.add(name)
            else:
                self.scaler.ended(name, "no machine has room", self.now)
        self.history.append(len(self.names))


def fleet(count: int, config: ScalingConfig = CONFIG, **more) -> Fleet:
    names = {f"instance-{n}" for n in range(count)}
    return Fleet(Scaler(config, lambda kind, reason, number: None), names, **more)


# ---- freeness


def test_an_idle_instance_beside_full_ones_is_not_averaged_away() -> None:
    full, idle = view("a", 20), view("b", 0)
    assert cluster_freeness([full, idle]) == (2 * BLOCKS - 200) / 20
    assert cluster_freeness([full, full]) == 0
    assert cluster_freeness([idle], demand=BLOCKS + 5) == -5


@given(
    loads=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    demand=st.integers(0, 2000),
    low=st.integers(0, 60),
)
def test_what_is_missing_is_added_and_no_more(loads, demand, low) -> None:
    views = [view(f"instance-{n}", load) for n, load in enumerate(loads)]
    count = shortage(views, demand, low)

    def reaches(more: int) -> bool:
        slack = sum(one.free for one in views) + more * BLOCKS - demand
        return slack >= low * max(1, sum(loads))

    assert reaches(count)
    assert count == 1 or not reaches(count - 1)


def test_a_large_shortage_brings_several_at_once() -> None:
    world = fleet(2, load=80)
    while len(world.names) == 2:
        world.step()
    # 80 requests of 10 blocks, and 10 blocks free for each: 1,600 blocks, and 6 at most.
    assert len(world.names) == 6


# ---- what operators see


def test_failures_are_described_until_a_start_succeeds() -> None:
    world = fleet(1, load=15, works=False)
    assert world.scaler.describe(0.0)["failure"] is None
    while not (told := world.scaler.describe(world.now))["failure"]:
        assert world.now < 60
        world.step()
    failure = told["failure"]
    assert (failure["instance_id"], failure["why"]) == ("instance-1", "no machine has room")
    assert (failure["age"], failure["retry_in"]) == (0.0, CONFIG.first_retry)
    text = tables.status({"scaling": told})
    assert "instance-1 was not started 0 s ago: no machine has room; not tried again for 10" in text
    world.step(CONFIG.first_retry / 2)
    assert world.scaler.describe(world.now)["failure"]["retry_in"] == CONFIG.first_retry / 2
    world.works = True
    while "instance-1" not in world.names:
        assert world.now < 120
        world.step()
    told = world.scaler.describe(world.now)
    assert told["failure"] is None or told["starting"]
    world.step()
    assert world.scaler.describe(world.now)["failure"] is None


def test_what_is_under_way_is_described() -> None:
    world = fleet(2, load=0)
    while not world.scaler.leaving:
        assert world.now < 60
        world.step()
    told = world.scaler.describe(world.now)
    assert (told["leaving"], told["starting"]) == (["instance-1"], {})
    assert "instance-1 is being emptied, then stopped" in tables.status({"scaling": told})
    slow = fleet(1, load=15)
    for _ in range(3):
        slow.scaler.update(slow.views(), {}, 0, slow.names.__contains__, slow.now)
        slow.now += 1.0
    told = slow.scaler.describe(slow.now)
    assert told["starting"] == {"instance-1": 1.0}
    assert "instance-1 is being started for 1 s" in tables.status({"scaling": told})


# ---- bounds


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(0, 150), st.integers(1, 30), st.booleans()), max_size=12),
    st.integers(1, 4),
    st.integers(0, 4),
)
def test_the_number_of_instances_stays_in_bounds(count, phases, low, more) -> None:
    config = replace(CONFIG, min_instances=low, max_instances=low + more)
    world = fleet(count, config)
    for load, steps, works in phases:
        world.load, world.works = load, works
        for _ in range(steps):
            before = len(world.names)
            world.step()
            after = len(world.names)
            assert after <= max(before, low + more)
            assert after >= min(before, low)
            assert len(world.names - world.scaler.leaving) >= min(before, low)
    world.works = True
    for _ in range(120):
        world.step(5.0)
    assert low <= len(world.names) <= low + more
    assert not world.scaler.orders()


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 6), st.integers(0, 150))
def test_under_a_steady_load_the_number_comes_to_rest(count, load) -> None:
    world = fleet(count, load=load)
    for _ in range(150):
        world.step()
    settled = len(world.names)
    for _ in range(150):
        world.step()
        assert len(world.names) == settled
    turns = [b - a for a, b in itertools.pairwise(world.history) if a != b]
    assert len({turn > 0 for turn in turns}) <= 1


def test_load_brings_instances_and_its_end_takes_them_away() -> None:
    world = fleet(1, load=60)
    for _ in range(60):
        world.step()
    most = len(world.names)
    assert most > 2
    world.load = 0
    for _ in range(100):
        world.step()
    assert len(world.names) == 1


def test_a_short_peak_changes_nothing() -> None:
    world = fleet(2, load=10)
    for _ in range(20):
        world.load = 100
        world.step(1.0)
        world.load = 10
        world.step(1.0)
    assert set(world.history) == {2}


# ---- starting and stopping


def test_a_start_that_fails_is_tried_again_ever_more_seldom() -> None:
    world = fleet(1, load=60, works=False)
    tried = []
    count = Counter[str]()

    def note(kind: str, reason: str, number: int) -> None:
        count[reason] += number
        if reason == "wanted":
            tried.append(world.now)

    world.scaler = Scaler(replace(CONFIG, first_retry=5.0, last_retry=40.0), note)
    for _ in range(200):
        world.step()
    assert count["failed"] == len(tried)
    gaps = [b - a for a, b in itertools.pairwise(dict.fromkeys(tried))]
    # All that are missing at first, then one at a time.
    assert tried.count(tried[0]) == 5
    assert len(gaps) == len(tried) - 5
    assert gaps == sorted(gaps)
    assert gaps[0] >= 5.0
    assert gaps[-1] == 40.0


def test_a_start_that_takes_too_long_is_given_up() -> None:
    scaler = Scaler(CONFIG, lambda kind, reason, number: None)
    full = [view("instance-0", 15)]
    for now in (0.0, 2.0):
        scaler.update(full, {}, 0, {"instance-0"}.__contains__, now)
    assert scaler.orders() == {"instance-1": START}
    scaler.update(full, {}, 0, {"instance-0"}.__contains__, 11.0)
    assert scaler.orders() == {"instance-1": STOP}
    scaler.ended("instance-1", "stopped", 11.0)
    assert scaler.orders() == {}


def test_an_instance_stops_only_once_it_is_empty() -> None:
    scaler = Scaler(CONFIG, lambda kind, reason, number: None)
    both = [view("instance-0", 3), view("instance-1", 1)]
    for now in (0.0, 2.0):
        scaler.update(both, {}, 0, bool, now)
    assert scaler.leaving == {"instance-1"}
    assert scaler.orders() == {}
    scaler.update(both, {"instance-1": False}, 0, bool, 3.0)
    assert scaler.orders() == {}
    scaler.update(both, {"instance-1": True}, 0, bool, 4.0)
    assert scaler.orders() == {"instance-1": STOP}
    scaler.ended("instance-1", "did not answer", 5.0)
    assert scaler.orders() == {}
    assert not scaler.leaving


def test_one_that_leaves_is_kept_when_the_load_grows() -> None:
    scaler = Scaler(CONFIG, lambda kind, reason, number: None)
    both = [view("instance-0", 3), view("instance-1", 1)]
    for now in (0.0, 2.0):
        scaler.update(both, {}, 0, bool, now)
    busy = [view("instance-0", 15), view("instance-1", 1, state=InstanceState.DRAINING)]
    for now in (6.0, 8.0):
        scaler.update(busy, {"instance-1": False}, 0, {"instance-0"}.__contains__, now)
    assert not scaler.leaving
    assert scaler.orders() == {}


def test_the_last_of_a_role_stays() -> None:
    scaler = Scaler(CONFIG, lambda kind, reason, number: None)
    views = [view("instance-0", 1, Role.PREFILL), view("instance-1", 2, Role.DECODE)]
    for now in (0.0, 2.0, 20.0):
        scaler.update(views, {}, 0, bool, now)
    assert not scaler.leaving
    with pytest.raises(ValueError, match="no number of instances"):
        ScalingConfig(min_instances=3, max_instances=2)


# ---- in the dispatcher


def test_the_dispatcher_empties_and_stops_an_instance() -> None:
    core = dispatcher(scaling=replace(CONFIG, cooldown=0.0))
    for name, requests in (("instance-0", 2), ("instance-1", 1)):
        core.handle(Joined(info(name)), 0.0)
        held = tuple(sequence(f"{name}.{n}", 10) for n in range(requests))
        core.handle(Reported(report(name, 1, held)), 0.0)
    core.handle(Tick(), 0.1)
    core.handle(Reported(report("instance-0", 2, tuple(core.members.staying("instance-0")))), 1.9)
    core.handle(Reported(report("instance-1", 2, tuple(core.members.staying("instance-1")))), 1.9)
    (move,) = core.handle(Tick(), 2.2) + core.handle(Tick(), 2.3)
    assert (move.source, move.reason) == ("instance-1", "scale_in")
    assert core.members.state("instance-1", 2.3) is InstanceState.DRAINING
    assert core.scaler.orders() == {}
    core.members.end(move.request_id)
    core.handle(Reported(report("instance-1", 3)), 2.4)
    core.handle(Tick(), 2.5)
    assert core.scaler.orders() == {"instance-1": STOP}
    core.handle(ScalingEnded("instance-1", "stopped"), 2.6)
    assert core.members.state("instance-1", 2.6) is InstanceState.GONE
    assert core.counters["scaling"] == {"leaving": 1, "stopped": 1}


# ---- settings


def test_roles_and_bounds_are_checked() -> None:
    assert role_count("prefill=2") == ("prefill", 2)
    for text in ("mixed=1", "prefill", "decode=0", "decode=x"):
        with pytest.raises(ConfigError):
            role_count(text)
    config = ServeConfig(instances=3, roles=(("prefill", 1), ("decode", 1)))
    assert config.instance_roles == (
        ("instance-0", Role.PREFILL),
        ("instance-1", Role.DECODE),
    )
    with pytest.raises(ConfigError, match="more than 1"):
        ServeConfig(instances=1, roles=(("prefill", 2),))
    with pytest.raises(ConfigError, match="max-instances"):
        ServeConfig(instances=3, max_instances=2)
