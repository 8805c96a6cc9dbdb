"""What a dispatcher exports, another begins with."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from cluster.dispatcher.core import Dispatcher, DispatcherConfig
from cluster.dispatcher.events import (
    DrainRequested,
    Joined,
    PlaceRequested,
    Reported,
    ResumeRequested,
    SetDraining,
)
from cluster.dispatcher.persistence import info_from_json, info_to_json
from tests.unit.dispatching import World, ask, dispatcher, info, placed, report


def restarted(state: Any, version: int = 10_000) -> Dispatcher:
    core = Dispatcher(DispatcherConfig(), random.Random(0), version)
    core.restore_state(json.loads(json.dumps(state)), 100.0)
    return core


def world(*names: str) -> World:
    made = World(dispatcher())
    for name in names:
        made.join(name)
    return made


def states(core: Dispatcher, now: float) -> dict[str, str]:
    return {view.info.instance_id: view.state for view in core.view(now).instances}


def test_instances_are_suspect_until_they_are_heard_of() -> None:
    core = restarted(world("i0", "i1").core.export_state(0.5))
    assert states(core, 100.0) == {"i0": "suspect", "i1": "suspect"}
    core.handle(Reported(report("i0", 7)), 100.1)
    assert states(core, 100.1) == {"i0": "ready", "i1": "suspect"}
    # One that started again is another one, and one that stays silent is gone.
    core.handle(Joined(info("i1", "b")), 100.2)
    assert core.members.knows("i1", "b")
    assert states(restarted(core.export_state(100.3)), 100.0 + 60.0) == {}


def test_a_suspect_instance_serves_where_there_is_no_other() -> None:
    core = restarted(world("i0").core.export_state(0.5))
    assert placed(core.handle(PlaceRequested(ask("r")), 100.0)) == ["i0"]


def test_what_is_known_by_itself_is_not_replaced_by_the_store() -> None:
    old = world("i0").core.export_state(0.5)
    core = Dispatcher(DispatcherConfig(), random.Random(0), 10_000)
    core.handle(Joined(info("i0", "b")), 99.0)
    core.handle(Reported(report("i0", 1, incarnation="b")), 99.9)
    core.restore_state(old, 100.0)
    assert core.members.knows("i0", "b")
    assert states(core, 100.0) == {"i0": "ready"}


def test_a_drain_outlives_the_dispatcher_and_the_instance() -> None:
    first = world("i0", "i1")
    first.core.handle(DrainRequested("i1"), 1.0)
    core = restarted(first.core.export_state(1.0))
    assert states(core, 100.0)["i1"] == "draining"
    assert core.handle(Joined(info("i1", "b")), 101.0)[0] == SetDraining("i1", True)
    assert states(core, 101.0)["i1"] == "draining"
    # The late snapshot of before does not undo what was ordered since.
    core.handle(ResumeRequested("i1"), 102.0)
    assert core.restore_state(first.core.export_state(1.0), 103.0) == []
    assert states(core, 103.0)["i1"] != "draining"


def test_a_restored_drain_is_told_to_the_instance() -> None:
    first = world("i0")
    first.core.handle(DrainRequested("i0"), 1.0)
    core = Dispatcher(DispatcherConfig(), random.Random(0), 10_000)
    core.handle(Joined(info("i0")), 99.0)
    told = core.restore_state(first.core.export_state(1.0), 100.0)
    assert told == [SetDraining("i0", True)]


def test_gateways_are_told_what_they_are_to_return() -> None:
    first = world("i0")
    first.core.handle(DrainRequested("i0"), 1.0)
    view = first.core.view(1.0)
    core = restarted({"overrides": view.overrides})
    assert core.overrides.export() == view.overrides
    assert "i0" in str(view.overrides)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"membership": 3, "overrides": [1]},
        {"membership": [1, {}, {"model": {}}], "overrides": {"draining/i9": [5, True], "x": 1}},
        {"unheard of": {"a": 1}},
    ],
)
def test_a_damaged_state_is_no_error(state: Any) -> None:
    core = restarted(state)
    assert core.view(100.0).instances == ()


def test_an_instance_as_json() -> None:
    written = json.loads(json.dumps(info_to_json(info("i0"))))
    assert info_from_json(written) == info("i0")
    assert info_from_json({**written, "of a later version": 1}) == info("i0")
    for spoiled in (
        {**written, "total_blocks": "many"},
        {**written, "address": ""},
        {**written, "model": {}},
        {key: value for key, value in written.items() if key != "incarnation"},
    ):
        assert info_from_json(spoiled) is None
