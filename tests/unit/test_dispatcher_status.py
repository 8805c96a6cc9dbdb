"""What operators see of the dispatcher is ready for JSON, and adds up."""

from __future__ import annotations

import json

from cluster.dispatcher import status
from tests.unit.dispatching import World, ask, dispatcher


def busy() -> World:
    world = World(dispatcher())
    world.join("i0")
    world.join("i1")
    for number in range(6):
        world.place(ask(f"r{number}"))
    world.run(1.0)
    return world


def test_instances() -> None:
    world = busy()
    found = json.loads(json.dumps(status.instances(world.core, world.now)))
    assert [one["instance_id"] for one in found] == ["i0", "i1"]
    assert sum(one["running"] + one["waiting"] for one in found) == 6
    assert {one["role"] for one in found} == {"mixed"}


def test_requests_are_chosen_and_limited() -> None:
    world = busy()
    everything = status.requests(world.core, world.now, 100)
    assert everything["num_requests"] == len(everything["requests"]) == 6
    few = json.loads(json.dumps(status.requests(world.core, world.now, 2)))
    assert (few["num_requests"], len(few["requests"])) == (6, 2)
    sums = [
        status.requests(world.core, world.now, 100, instance_id=name)["num_requests"]
        for name in ("i0", "i1", "i9")
    ]
    assert (sum(sums), sums[2]) == (6, 0)
    of_default = status.requests(world.core, world.now, 100, tenant="default")
    assert of_default == everything
    assert status.requests(world.core, world.now, 100, tenant="nobody")["num_requests"] == 0


def test_tenants_are_those_with_requests_or_settings() -> None:
    world = busy()
    world.core.set_tenant("gold", {"weight": 4})
    found = json.loads(json.dumps(status.tenants(world.core, world.now)))
    by_name = {one["tenant"]: one for one in found["tenants"]}
    assert set(by_name) == {"default", "gold"}
    assert by_name["gold"]["weight"] == 4
    default = by_name["default"]
    assert default["running"] + default["waiting"] == 6
    assert set(found["gaps"]) == {"interactive", "standard", "batch"}
    assert all(gap["gap"] >= 0 for gap in found["gaps"].values())
