"""The dispatcher actor on a real Ray, with small stand-ins for instances."""

import asyncio
import contextlib
import os
import threading
import time
from pathlib import Path

import pytest

from cluster import launch, ray_setup
from cluster.dispatcher.actor import DispatcherActor
from cluster.dispatcher.core import DispatcherConfig
from cluster.dispatcher.load import LoadConfig
from cluster.dispatcher.messages import ClusterView, Placement, Refusal
from cluster.dispatcher.operators import OrderError
from cluster.dispatcher.rebalance import RebalanceConfig
from cluster.dispatcher.requests import RequestConfig
from cluster.names import ClusterRef
from cluster.reporter import DispatcherReporter
from instance.load import InstanceInfo, LoadReport, MigrationReport
from tests.integration.valkey import running
from tests.unit.dispatching import ask, info, report, sequence

CLUSTER = ClusterRef(namespace="dispatcher-test")


@pytest.fixture(scope="module")
def ray():
    folder = ray_setup.short_temp_dir()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_TMPDIR", "PYTHONPATH"):
            patch.setenv(name, "")
        ray_setup.prepare_ray("", folder)
        import ray

        ray.init(
            address="local",
            namespace=CLUSTER.namespace,
            include_dashboard=False,
            object_store_memory=100_000_000,
            log_to_driver=False,
            _temp_dir=folder,
        )
        yield ray
        ray_setup.shut_down_ray(folder)


class FakeInstance:
    """Reports a fixed load through the real reporter and answers migrations at once."""

    def __init__(self, name: str, requests: tuple[str, ...]) -> None:
        self._info = info(name, incarnation=f"{name}-{os.getpid()}")
        self._requests = list(requests)
        self._draining = False
        self._reporter = DispatcherReporter(CLUSTER)
        self._reporter(self._info)
        threading.Thread(target=self._report, daemon=True).start()

    def _report(self) -> None:
        number = 0
        while True:
            number += 1
            found = tuple(sequence(name, 10) for name in self._requests)
            self._reporter(
                report(
                    self._info.instance_id,
                    number,
                    found,
                    self._info.incarnation,
                    draining=self._draining,
                )
            )
            time.sleep(0.05)

    def info(self) -> InstanceInfo:
        return self._info

    def migrate(self, request_id: str, destination: InstanceInfo, reason: str) -> MigrationReport:
        if request_id == "fragile":
            raise RuntimeError("the source broke")
        self._requests.remove(request_id)
        return MigrationReport(
            request_id, "1", self._info.instance_id, destination.instance_id, reason, "moved", 3
        )

    def drain(self, on: bool) -> None:
        self._draining = on

    def check(self) -> dict[str, int]:
        if self._info.instance_id == "i0":
            raise RuntimeError("block 3 is held twice")
        return {"used_blocks": 0}

    def drains(self) -> bool:
        return self._draining


@pytest.fixture
def cluster(ray):
    """A dispatcher as the launcher makes it, and two instances that have joined."""
    dispatcher = launch.start_dispatcher(
        DispatcherConfig(
            requests=RequestConfig(hold_timeout=120.0, home_timeout=120.0),
            load=LoadConfig(report_interval=5.0),
            rebalance=RebalanceConfig(enabled=False),
        ),
        CLUSTER,
    )
    remote = ray.remote(FakeInstance)
    instances = {
        name: remote.options(
            name=CLUSTER.actor_name(name), max_concurrency=4, num_cpus=0, max_restarts=-1
        ).remote(name, requests)
        for name, requests in (("i0", ("steady", "mover", "fragile")), ("i1", ()))
    }
    wait_for(lambda: counts(ray, dispatcher) == (2, 3))
    yield dispatcher, instances
    for actor in (dispatcher, *instances.values()):
        ray.kill(actor)
    with contextlib.suppress(ValueError):
        while ray.get_actor(CLUSTER.dispatcher):
            time.sleep(0.05)


def status(ray, dispatcher) -> dict:
    return ray.get(dispatcher.status.remote(), timeout=60)


def counts(ray, dispatcher) -> tuple[int, int]:
    found = status(ray, dispatcher)
    return len(found["instances"]), len(found["requests"])


def wait_for(condition) -> None:
    """Until true; the test's own timeout is the bound."""
    while not condition():
        time.sleep(0.02)


def migrated_once_there_is_room(ray, dispatcher, request_id: str) -> MigrationReport:
    """A report on its way may still say that the destination drains."""
    while True:
        try:
            return ray.get(dispatcher.migrate.remote(request_id))
        except ray.exceptions.RayTaskError as error:
            if error.cause.code != "conflict":
                raise
            time.sleep(0.05)


def test_a_dispatcher_in_full(ray, cluster) -> None:
    dispatcher, instances = cluster

    # Placement: answers in the order asked, the same answer for a repeated call.
    requests = [ask(f"r{n}") for n in range(10)]
    answers = ray.get(dispatcher.place.remote(requests))
    assert [answer.request_id for answer in answers] == [r.request_id for r in requests]
    assert all(isinstance(answer, Placement) for answer in answers)
    assert {answer.incarnation.partition("-")[0] for answer in answers} == {"i0", "i1"}
    assert ray.get(dispatcher.place.remote(requests)) == answers
    ray.get(dispatcher.finished.remote([(r.request_id, 1) for r in requests]))
    (late,) = ray.get(dispatcher.place.remote(requests[:1]))
    assert isinstance(late, Refusal)

    # The long poll answers at once where the version differs, else when it changes.
    view = ray.get(dispatcher.watch.remote(-1, 60.0))
    assert isinstance(view, ClusterView)
    assert {v.info.instance_id for v in view.instances} == {"i0", "i1"}
    assert ray.get(dispatcher.watch.remote(view.version, 0.05)).version == view.version
    pending = dispatcher.watch.remote(view.version, 60.0)
    ray.get(dispatcher.drain.remote("i1"))
    changed = ray.get(pending)
    assert changed.version > view.version
    assert {v.state for v in changed.instances} == {"ready", "draining"}
    wait_for(lambda: ray.get(instances["i1"].drains.remote()))
    ray.get(dispatcher.resume.remote("i1"))
    wait_for(lambda: not ray.get(instances["i1"].drains.remote()))
    wait_for(
        lambda: {entry["state"] for entry in status(ray, dispatcher)["instances"]} == {"ready"}
    )
    with pytest.raises(Exception, match="there is no instance 'i9'") as missing:
        ray.get(dispatcher.drain.remote("i9"))
    assert missing.value.cause.code == "unknown_instance"

    assert ray.get(dispatcher.check.remote())["instances"] == [
        {"instance_id": "i0", "error": "block 3 is held twice"},
        {"instance_id": "i1", "used_blocks": 0},
    ]

    # What no instance can take is held, and answered by another call, which nothing else ends.
    pending = dispatcher.answers.remote("gateway-0", 60.0)
    at_once = ray.get(dispatcher.place.remote([ask("at once")], [("unknown", 1)]))
    assert isinstance(at_once[0], Placement)
    assert ray.wait([pending], timeout=0.2)[0] == []
    for name in instances:
        ray.get(dispatcher.drain.remote(name))
    held = ask("held")
    assert ray.get(dispatcher.place.remote([held])) == [None]
    assert ray.get(dispatcher.answers.remote(held.gateway_id, 0.01)) == []
    for name in instances:
        ray.get(dispatcher.resume.remote(name))
    (answer,) = ray.get(pending)
    assert isinstance(answer, Placement)
    assert (held.gateway_id, answer.request_id) == ("gateway-0", "held")
    assert ray.get(dispatcher.place.remote([held])) == [answer]


def test_migrations_on_demand(ray, cluster) -> None:
    dispatcher, _ = cluster
    moved = migrated_once_there_is_room(ray, dispatcher, "mover")
    assert (moved.outcome, moved.source, moved.destination) == ("moved", "i0", "i1")
    failed = ray.get(dispatcher.migrate.remote("fragile", "i1"))
    assert failed.outcome == "error: the source broke"
    for request_id, destination, code in (
        ("nobody", None, "unknown_request"),
        ("steady", "i9", "unknown_instance"),
        ("steady", "i0", "conflict"),
    ):
        with pytest.raises(Exception, match=r".") as caught:
            ray.get(dispatcher.migrate.remote(request_id, destination))
        assert caught.value.cause.code == code
    found = status(ray, dispatcher)
    # Whatever the dispatcher moves by itself on a machine that lags is not the test's matter.
    ordered = [m["outcome"] for m in found["migrations"] if m["reason"] == "admin"]
    assert ordered == ["error: the source broke", "moved"]
    assert found["counters"]["migrations_started"]["admin"] == 2


def test_operators_change_tenants_and_policies(ray, cluster) -> None:
    dispatcher, _ = cluster
    gold = ray.get(dispatcher.set_tenant.remote("gold", {"weight": 3}, "ann"))
    assert (gold["tenant"], gold["weight"]) == ("gold", 3.0)
    by_name = {one["tenant"]: one for one in ray.get(dispatcher.tenants.remote())["tenants"]}
    assert by_name["gold"]["weight"] == 3.0
    assert by_name["default"]["running"] == 3
    ray.get(dispatcher.set_policies.remote({"placement": "round_robin"}, True, "ann"))
    assert ray.get(dispatcher.policies.remote())["placement"] == "freeness"
    ray.get(dispatcher.set_policies.remote({"placement": "round_robin"}, False, "ann"))
    found = ray.get(dispatcher.policies.remote())
    assert found["placement"] == "round_robin"
    assert [(one["who"], one["what"]) for one in found["audit"]] == [
        ("ann", "placement"),
        ("ann", "tenant/gold"),
    ]
    for order in (
        dispatcher.set_tenant.remote("gold", {"weight": 0}, "ann"),
        dispatcher.set_policies.remote({"placement": "nonsense"}, False, "ann"),
    ):
        with pytest.raises(Exception, match=r".") as caught:
            ray.get(order)
        assert caught.value.cause.code == "invalid_value"
    found = ray.get(dispatcher.requests.remote(2, "i0", ""))
    assert (found["num_requests"], len(found["requests"])) == (3, 2)
    assert {one["instance_id"] for one in ray.get(dispatcher.instances.remote())} == {"i0", "i1"}


def state_of(ray, dispatcher, name: str) -> str:
    found = ray.get(dispatcher.instances.remote())
    return next((one["state"] for one in found if one["instance_id"] == name), "gone")


def test_a_drain_may_end_with_the_process(ray, cluster) -> None:
    dispatcher, instances = cluster
    for _ in range(2):
        ray.get(dispatcher.drain.remote("i1", True))
        assert state_of(ray, dispatcher, "i1") == "draining"
        assert ray.get(instances["i1"].drains.remote())
        # One that was ended by hand does not stand in the way of the next.
        ray.get(dispatcher.resume.remote("i1"))
        assert state_of(ray, dispatcher, "i1") == "ready"
    ray.get(dispatcher.drain.remote("i1", True))
    before = ray.get(instances["i1"].info.remote()).incarnation
    ray.kill(instances["i1"], no_restart=False)

    def another_is_ready() -> bool:
        found = {one["instance_id"]: one for one in ray.get(dispatcher.instances.remote())}
        one = found.get("i1", {"incarnation": before})
        return one["incarnation"] != before and one["state"] == "ready"

    wait_for(another_is_ready)
    ray.kill(instances["i1"])
    with pytest.raises(Exception, match="cannot be drained") as caught:
        ray.get(dispatcher.drain.remote("i1", True))
    assert caught.value.cause.code == "conflict"


def write_policy(folder: Path, name: str, index: int) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"def choose(request, views, cached):\n    return views[{index}]\n")
    return file


async def test_files_of_policies_come_from_one_folder_only(tmp_path) -> None:
    folder = tmp_path / "policies"
    first = f"{write_policy(tmp_path, 'first.py', 0)}:choose"
    inner = f"{write_policy(folder, 'inner.py', 0).resolve()}:choose"
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\ndef choose(*_): pass\n")
    (folder / "link.py").symlink_to(tmp_path / "evil.py")
    config = DispatcherConfig(placement=first)
    dispatcher = DispatcherActor(config, CLUSTER, policy_dir=str(folder))
    closed = DispatcherActor(config, CLUSTER)

    for actor, name in (
        (dispatcher, "../evil.py:choose"),
        (dispatcher, f"{tmp_path}/evil.py:choose"),
        (dispatcher, "link.py:choose"),
        (closed, f"{folder}/inner.py:choose"),
        (closed, f"{tmp_path}/evil.py:choose"),
    ):
        for dry_run in (True, False):
            with pytest.raises(OrderError, match="--policy-dir") as caught:
                await actor.set_policies({"placement": name, "rebalance": False}, dry_run, "ann")
            assert (caught.value.code, caught.value.param) == ("forbidden", "placement")
        assert (await actor.policies())["placement"] == first
        assert (await actor.policies())["rebalance"]
    assert not marker.exists()

    for actor in (dispatcher, closed):
        await actor.set_policies({"placement": "random"}, False, "ann")
        # The one of the start is known, wherever its file is.
        assert (await actor.set_policies({"placement": first}, False, "ann"))["placement"] == first
    after = await dispatcher.set_policies({"placement": "inner.py:choose"}, False, "ann")
    assert after["placement"] == inner
    with pytest.raises(OrderError, match="there is no file") as caught:
        await dispatcher.set_policies({"placement": "gone.py:choose"}, False, "ann")
    assert caught.value.code == "invalid_value"

    # What a gateway or a store remembers is held to the same folder.
    told = {"overrides": (await dispatcher.watch(-1, 0.0)).overrides}
    for again, holds in (
        (DispatcherActor(config, CLUSTER, policy_dir=str(folder)), inner),
        (DispatcherActor(config, CLUSTER), first),
    ):
        await again.watch(-1, 0.0, told)
        assert (await again.policies())["placement"] == holds


def test_what_operators_set_outlives_a_killed_dispatcher(ray, cluster) -> None:
    """A gateway returns it with its first call to the new one."""
    dispatcher, _ = cluster
    ray.get(dispatcher.drain.remote("i1"))
    told = ray.get(dispatcher.watch.remote(-1, 60.0)).overrides
    before = status(ray, dispatcher)
    ray.kill(dispatcher, no_restart=False)

    def back() -> bool:
        try:
            return status(ray, dispatcher)["started"] > before["started"]
        except ray.exceptions.RayActorError:
            return False

    wait_for(back)
    assert "draining/i1" in told
    assert not ray.get(dispatcher.watch.remote(-1, 60.0)).overrides
    assert ray.get(dispatcher.watch.remote(-1, 60.0, {"overrides": told})).overrides == told
    wait_for(lambda: counts(ray, dispatcher) == (2, 3))
    found = {one["instance_id"]: one["state"] for one in status(ray, dispatcher)["instances"]}
    assert found["i1"] == "draining"


def test_a_new_dispatcher_begins_with_what_redis_has(ray) -> None:
    with running() as server:
        other = ClusterRef("drover-stored", CLUSTER.namespace)
        first = launch.start_dispatcher(DispatcherConfig(), other, server.url)
        ray.get(first.join.remote(info("i7")))
        ray.get(first.drain.remote("i7"))
        ray.get(first.flush.remote())
        ray.kill(first)
        wait_for(lambda: gone(ray, other.dispatcher))
        second = launch.start_dispatcher(DispatcherConfig(), other, server.url)
        wait_for(lambda: status(ray, second)["instances"])
        (entry,) = status(ray, second)["instances"]
        assert (entry["instance_id"], entry["state"]) == ("i7", "draining")
        assert status(ray, second)["store"]["up"]
        figures = ray.get(second.figures.remote())["dispatcher"]
        assert ("drover_store_up", 1) in [(one.name, one.value) for one in figures]
        ray.kill(second)


def gone(ray, name: str) -> bool:
    try:
        ray.get_actor(name, namespace=CLUSTER.namespace)
    except ValueError:
        return True
    return False


def test_a_killed_dispatcher_restarts_and_rebuilds_from_reports(ray, cluster) -> None:
    dispatcher, _ = cluster
    before = status(ray, dispatcher)
    ray.kill(dispatcher, no_restart=False)

    def rebuilt() -> bool:
        try:
            started = status(ray, dispatcher)["started"] > before["started"]
            return started and counts(ray, dispatcher) == (2, 3)
        except ray.exceptions.RayActorError:
            return False

    wait_for(rebuilt)
    after = status(ray, dispatcher)
    assert after["version"] > before["version"]
    assert {entry["instance_id"] for entry in after["instances"]} == {"i0", "i1"}
    (answer,) = ray.get(dispatcher.place.remote([ask("after")]))
    assert isinstance(answer, Placement)
    again = ray.get_actor(CLUSTER.dispatcher, namespace=CLUSTER.namespace)
    assert ray.get(again.migrate.remote("mover", "i1")).outcome == "moved"


async def test_the_dispatcher_can_be_awaited(ray, cluster) -> None:
    dispatcher, _ = cluster
    answers = await asyncio.gather(*(dispatcher.place.remote([ask(f"c{n}")]) for n in range(20)))
    chosen = [answer.instance_id for (answer,) in answers]
    assert len(chosen) == 20
    assert set(chosen) == {"i0", "i1"}


def test_a_reporter_never_blocks_and_the_latest_report_wins(ray) -> None:
    reporter = DispatcherReporter(ClusterRef("drover-nobody", CLUSTER.namespace))
    reporter(info("i2"))
    for number in range(1000):
        reporter(report("i2", number))
    # While it tries to deliver one, the report is in the thread's hands.
    wait_for(lambda: isinstance(reporter._report, LoadReport))
    assert reporter._report.number == 999
