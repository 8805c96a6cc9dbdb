"""Instances that come and go by order, without a real Ray."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from cluster.config import ServeConfig
from cluster.dispatcher.scaling import START, STOP
from cluster.fleet import STOP_TIMEOUT, Fleet
from tests.unit.dispatching import info

CONFIG = ServeConfig()


@dataclass(eq=False)
class Reference:
    """An answer that comes when the test says so."""

    value: object = None
    done: bool = False

    def answer(self, value: object) -> None:
        self.value, self.done = value, True


@dataclass(eq=False)
class Handle:
    start: object = field(default_factory=lambda: Method())
    progress: object = field(default_factory=lambda: Method())
    stop: object = field(default_factory=lambda: Method())
    killed: bool = False


class Method:
    def __init__(self) -> None:
        self.reference = Reference()

    def remote(self) -> Reference:
        return self.reference


class World:
    """A fleet whose Ray answers by hand and whose clock stands still."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.said: list[str] = []
        self.made: list[Handle] = []
        self.fleet = Fleet(CONFIG, self.said.append, lambda: self.now)
        monkeypatch.setattr(self.fleet, "_create", self.create)
        fake = SimpleNamespace(wait=self.wait, get=self.get, kill=self.kill)
        monkeypatch.setitem(sys.modules, "ray", fake)

    def create(self, name: str) -> Handle:
        self.made.append(Handle())
        return self.made[-1]

    @staticmethod
    def wait(references, timeout):
        assert timeout == 0
        return [r for r in references if r.done], [r for r in references if not r.done]

    @staticmethod
    def get(reference):
        if isinstance(reference.value, Exception):
            raise reference.value
        return reference.value

    @staticmethod
    def kill(handle, no_restart):
        assert no_restart
        handle.killed = True


@pytest.fixture
def world(monkeypatch) -> World:
    return World(monkeypatch)


def test_an_instance_starts_once_however_often_it_is_ordered(world) -> None:
    assert world.fleet.follow({"instance-2": START}) == {}
    assert world.fleet.follow({"instance-2": START}) == {}
    assert len(world.made) == 1
    world.made[0].start.reference.answer(info("instance-2"))
    assert world.fleet.follow({"instance-2": START}) == {"instance-2": "started"}
    assert world.fleet.follow({}) == {}
    assert list(world.fleet.handles) == ["instance-2"]


def test_one_that_no_machine_has_room_for_is_given_up_and_said(world) -> None:
    world.fleet.follow({"instance-2": START})
    world.now = CONFIG.scale_out_timeout + 1
    (outcome,) = world.fleet.follow({"instance-2": START}).values()
    assert "no machine had room" in outcome
    assert world.made[0].killed
    assert world.fleet.handles == {}
    assert any("no machine had room" in line for line in world.said)


def test_one_that_runs_may_take_its_time_to_load(world) -> None:
    world.fleet.follow({"instance-2": START})
    world.made[0].progress.reference.answer("loading weights")
    world.now = 10 * CONFIG.scale_out_timeout
    assert world.fleet.follow({"instance-2": START}) == {}


def test_one_that_fails_says_why_and_may_be_tried_again(world) -> None:
    world.fleet.follow({"instance-2": START})
    world.made[0].start.reference.answer(RuntimeError("no such model"))
    assert world.fleet.follow({"instance-2": START}) == {"instance-2": "no such model"}
    assert world.fleet.follow({"instance-2": START}) == {}
    assert len(world.made) == 2


def test_an_instance_is_stopped_kindly_and_then_for_good(world) -> None:
    world.fleet.handles = {"instance-0": world.create("instance-0")}
    assert world.fleet.follow({"instance-0": STOP}) == {}
    assert not world.made[0].killed
    world.made[0].stop.reference.answer(None)
    assert world.fleet.follow({"instance-0": STOP}) == {"instance-0": "stopped"}
    assert world.made[0].killed
    assert world.fleet.follow({"instance-0": STOP}) == {"instance-0": "stopped"}


def test_one_that_does_not_stop_is_killed(world) -> None:
    world.fleet.handles = {"instance-0": world.create("instance-0")}
    world.fleet.follow({"instance-0": STOP})
    world.now = STOP_TIMEOUT + 1
    assert world.fleet.follow({"instance-0": STOP}) == {"instance-0": "stopped"}
    assert world.made[0].killed


def test_a_start_may_be_called_off(world) -> None:
    world.fleet.follow({"instance-2": START})
    world.fleet.follow({"instance-2": STOP})
    world.now = STOP_TIMEOUT + 1
    assert world.fleet.follow({"instance-2": STOP}) == {"instance-2": "stopped"}
    assert world.made[0].killed
