"""Gateway, dispatcher and instances in one process: requests wait, and all service is counted.

Everything is real but Ray: its calls are made directly.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from cluster.dispatcher.actor import DispatcherActor
from cluster.dispatcher.core import DispatcherConfig
from cluster.dispatcher.load import LoadConfig
from cluster.dispatcher.messages import Placement, PlaceRequest, Refusal
from cluster.dispatcher.rebalance import RebalanceConfig
from cluster.dispatcher.requests import RequestConfig
from cluster.dispatcher.tenants import TenantPolicy
from cluster.gateway import dispatching
from cluster.gateway.dispatching import DispatcherClient
from cluster.gateway.router import Router
from cluster.gateway.stream import RequestFailed, RequestStream
from cluster.names import ClusterRef
from instance.clock import RealClock
from instance.config import EngineConfig, MigrationConfig, SchedulerConfig
from instance.executor import ModelDescription
from instance.fairness import service
from instance.load import InstanceInfo, LoadReport
from instance.model.modelled import ModelledExecutor
from instance.request import Request, RequestClass, SamplingParams
from instance.server import InstanceServer
from instance.step_cost import StepCost
from tests.unit.dispatching import ask

TOKEN = "secret"
MODEL = ModelDescription("m", "float32", 4, 2, 2, 8, 1000, 4096)
CONFIG = EngineConfig(
    heartbeat=0.1,
    report_interval=0.05,
    scheduler=SchedulerConfig(
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_model_len=4096,
        enable_prefix_caching=False,
        theta=200.0,
    ),
    migration=MigrationConfig(grace=5.0),
)
WEIGHTS = {"a": 1.0, "b": 2.0}


class Reference:
    """A call under way, as Ray's callers see it."""

    def __init__(self, work: Coroutine[Any, Any, Any]) -> None:
        self._task = asyncio.ensure_future(work)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._task.__await__()

    def future(self) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def done(task: asyncio.Task[Any]) -> None:
            if task.cancelled():
                future.cancel()
            elif task.exception() is not None:
                future.set_exception(task.exception())
            else:
                future.set_result(task.result())

        self._task.add_done_callback(done)
        return future


class Method:
    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def remote(self, *args: Any) -> Reference:
        async def work() -> Any:
            result = self._call(*args)
            return await result if asyncio.iscoroutine(result) else result

        return Reference(work())


class Handle:
    """Calls an object's methods as if it were an actor."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Method:
        return Method(getattr(self._target, name))


class Instance:
    """What an instance's actor offers, around a server on this loop."""

    def __init__(self, server: InstanceServer) -> None:
        self.server = server
        self.take_ledger = server.take_ledger
        self.migrate = server.migrate
        self.tell_prefixes = server.reports.tell_prefixes

    def copy_ledger(self) -> tuple[str, Any]:
        return self.server.incarnation, self.server.counters.copy()


class World:
    """A dispatcher, its instances, and a gateway's router."""

    def __init__(self, **requests: Any) -> None:
        settings = RequestConfig(
            tenants={name: TenantPolicy(weight) for name, weight in WEIGHTS.items()}, **requests
        )
        # A slow machine is no reason to give anything up.
        patient = LoadConfig(report_interval=30.0, gone_after=600.0)
        self.config = DispatcherConfig(
            requests=replace(settings, home_timeout=600.0, hold_timeout=600.0),
            load=patient,
            rebalance=RebalanceConfig(enabled=False),
        )
        self.instances: dict[str, Instance] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.dispatcher = self.start_dispatcher()
        self.placer = DispatcherClient("home", lambda: Handle(self.dispatcher), 600.0)
        self.router = Router("home", TOKEN, self.placer, connect_timeout=5.0)
        self.worth = dict.fromkeys(WEIGHTS, 0.0)
        self._number = 0

    def start_dispatcher(self) -> DispatcherActor:
        self.dispatcher = DispatcherActor(self.config, ClusterRef())
        self.dispatcher._instance = lambda name: Handle(self.instances[name])  # type: ignore[method-assign]
        return self.dispatcher

    def report(self, news: InstanceInfo | LoadReport) -> None:
        async def tell() -> None:
            if isinstance(news, InstanceInfo):
                await self.dispatcher.join(news)
            elif not await self.dispatcher.report(news):
                info = self.instances[news.instance_id].server.info
                assert info is not None
                await self.dispatcher.join(info)
                await self.dispatcher.report(news)

        task = asyncio.ensure_future(tell())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def add(self, name: str, blocks: int = 60) -> None:
        executor = ModelledExecutor(MODEL, blocks, RealClock(), StepCost(0.002, 1e-6, 1e-6, 0.0))
        server = InstanceServer(name, f"{name}-1", executor, CONFIG, TOKEN, reporter=self.report)
        self.instances[name] = Instance(server)
        await server.start()

    def submit(self, tenant: str, prompt: int, tokens: int) -> RequestStream:
        self._number += 1
        self.worth[tenant] += service(prompt, tokens)
        request = Request(
            f"{tenant}{self._number}",
            (self._number,) * prompt,
            SamplingParams(seed=1, max_tokens=tokens, ignore_eos=True),
            home="home",
            tenant=tenant,
            arrival=float(self._number),
        )
        return self.router.submit(request)

    def charged(self, tenant: str) -> float:
        book = self.dispatcher._core.ledger.accounts.get((tenant, RequestClass.STANDARD))
        return 0.0 if book is None else book.service


async def drained(stream: RequestStream) -> int:
    return sum([len(delta.tokens) async for delta in stream])


async def until(condition: Callable[[], bool]) -> None:
    """The test's own timeout is the bound."""
    while not condition():
        await asyncio.sleep(0.01)


@asynccontextmanager
async def started(*names: str, **requests: Any) -> AsyncIterator[World]:
    world = World(**requests)
    await world.router.start()
    for name in names:
        await world.add(name)
    await world.router.wait_connected(len(names))
    try:
        yield world
    finally:
        await world.router.close()
        for instance in world.instances.values():
            await instance.server.stop()
        for task in world.dispatcher._running:
            task.cancel()


async def test_requests_wait_for_room_and_every_token_is_charged_once() -> None:
    async with started("i0", "i1", run_ahead=1) as world:
        streams = [world.submit(tenant, 20, 30) for _ in range(15) for tenant in "ab"]
        await until(lambda: world.dispatcher._core.num_held > 0)
        held = world.dispatcher._core.num_held
        assert held + 2 * (4 + 2) >= 30 - 12
        assert await asyncio.gather(*map(drained, streams)) == [30] * 30
        await until(lambda: all(world.charged(name) == world.worth[name] for name in "ab"))
        core = world.dispatcher._core
        await until(lambda: not len(core.placing.waiting))
        assert core.num_held == 0
        assert {one.server.counters.weight("b") for one in world.instances.values()} == {2.0}
        versions = [one.server.counters.version for one in world.instances.values()]
        assert min(versions) > 0


async def test_what_a_dead_instance_did_is_known_by_its_gateways() -> None:
    async with started("i0", "i1") as world:
        streams = [world.submit("a", 20, 60) for _ in range(6)]
        results = [asyncio.ensure_future(drained(stream)) for stream in streams]
        victim = world.instances["i0"].server
        await until(lambda: any(stream.num_output > 5 for stream in streams))
        await victim.stop()
        del world.instances["i0"]
        await world.dispatcher.leave("i0", "i0-1")
        assert await asyncio.gather(*results) == [60] * 6
        await until(lambda: world.charged("a") >= world.worth["a"])
        # Tokens that never reached the gateway were computed, and charged, again.
        replays = sum(stream.replays for stream in streams)
        assert world.charged("a") <= world.worth["a"] + replays * service(20, 60)


async def test_a_restarted_dispatcher_has_its_ledger_back() -> None:
    async with started("i0", "i1") as world:
        before = [world.submit(tenant, 20, 30) for tenant in "abab"]
        await asyncio.gather(*map(drained, before))
        await until(lambda: all(world.charged(name) == world.worth[name] for name in "ab"))
        old = world.dispatcher._core.ledger
        account = "b", RequestClass.STANDARD
        await until(
            lambda: all(
                one.server.counters.counter(account) >= old.counter(account)
                for one in world.instances.values()
            )
        )
        for task in world.dispatcher._running:
            task.cancel()
        world.start_dispatcher()
        new = world.dispatcher._core.ledger
        await until(lambda: new.counter(account) == old.counter(account))
        after = [world.submit(tenant, 20, 30) for tenant in "ab"]
        assert await asyncio.gather(*map(drained, after)) == [30, 30]


async def test_a_tenant_over_its_limit_is_told_when_to_come_back() -> None:
    limited = {"a": TenantPolicy(max_queued=2)}
    async with started("i0", run_ahead=1) as world:
        world.dispatcher._core.set_tenant("a", {"max_queued": limited["a"].max_queued})
        streams = [world.submit("a", 20, 200) for _ in range(30)]
        results = await asyncio.gather(*map(drained, streams), return_exceptions=True)
        failed = [one for one in results if isinstance(one, RequestFailed)]
        assert failed
        assert {(one.status, one.code) for one in failed} == {(429, "tenant_queue_full")}
        assert all(one.retry_after is not None and one.retry_after >= 1 for one in failed)
        assert [one for one in results if one == 200]


# ---- the gateway's client alone


class Scripted:
    """A dispatcher whose answers the test decides."""

    def __init__(self) -> None:
        self.asked: list[PlaceRequest] = []
        self.ended: list[list[tuple[str, int]]] = []
        self.calls: list[str] = []
        self.ready: asyncio.Queue[Placement | Refusal] = asyncio.Queue()
        self.away = False

    async def place(
        self, requests: list[PlaceRequest], ended: list[tuple[str, int]]
    ) -> list[Placement | Refusal | None]:
        if self.away:
            raise ConnectionError("gone")
        self.calls.append("place")
        self.asked += requests
        self.ended.append(ended)
        return [None] * len(requests)

    async def answers(self, gateway_id: str, timeout: float) -> list[Placement | Refusal]:
        return [await self.ready.get()]

    async def finished(self, ended: list[tuple[str, int]]) -> None:
        self.calls.append("finished")
        self.ended.append(ended)

    async def watch(self, version: int, timeout: float, known: object) -> Any:
        await asyncio.Event().wait()


@asynccontextmanager
async def client() -> AsyncIterator[tuple[Scripted, DispatcherClient]]:
    scripted = Scripted()
    one = DispatcherClient("home", lambda: Handle(scripted), 600.0)
    one.start()
    try:
        yield scripted, one
    finally:
        await one.close()


async def test_a_held_request_is_answered_later() -> None:
    async with client() as (scripted, one):
        first, second = one.place(ask("r1")), one.place(ask("r2"))
        await until(lambda: len(scripted.asked) == 2)
        assert not first.done()
        placement = Placement("r2", 1, "i0", "x")
        scripted.ready.put_nowait(Placement("unknown", 1, "i0", "x"))
        scripted.ready.put_nowait(placement)
        assert await second == placement
        assert not first.done()


async def test_ends_go_with_the_next_placement_in_one_call() -> None:
    async with client() as (scripted, one):
        one.place(ask("r1"))
        await until(lambda: len(scripted.asked) == 1)
        one.finished("r0", 3)
        one.finished("r1", 1)
        one.place(ask("r2"))
        await until(lambda: len(scripted.asked) == 2)
        assert scripted.calls == ["place", "place"]
        assert scripted.ended == [[], [("r0", 3), ("r1", 1)]]
        one.finished("r2", 1)
        await until(lambda: scripted.calls[2:] == ["finished"])
        assert scripted.ended[2] == [("r2", 1)]


async def test_what_stays_unanswered_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatching, "ASK_AGAIN", 0.02)
    async with client() as (scripted, one):
        future = one.place(ask("r", time_left=1000.0))
        await until(lambda: len(scripted.asked) >= 3)
        left = [request.time_left for request in scripted.asked]
        assert left == sorted(left, reverse=True)
        assert 0 < left[-1] < left[0] <= 1000.0
        scripted.away = True
        answer = await future
        assert isinstance(answer, Refusal)  # no instance is known to place it by
        assert answer.status == 503


async def test_a_request_given_up_needs_no_answer() -> None:
    async with client() as (scripted, one):
        future = one.place(ask("r"))
        await until(lambda: bool(scripted.asked))
        one.finished("r", 1)
        answer = await future
        assert isinstance(answer, Refusal)
        assert answer.status == 404
