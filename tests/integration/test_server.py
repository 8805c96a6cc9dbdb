"""Two instance servers and a gateway's router in one process, over real gRPC."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from bench.instances import FixedPlacer
from cluster.gateway.links import InstanceLink
from cluster.gateway.router import Router
from cluster.gateway.stream import RequestStream
from instance import wire
from instance.clock import RealClock
from instance.config import (
    EngineConfig,
    MigrationConfig,
    PreemptionMode,
    SchedulerConfig,
    SwapConfig,
)
from instance.engine import KvPlace
from instance.executor import ModelDescription
from instance.kv.blocks import BlockPool
from instance.load import MigrationReport
from instance.model.modelled import ModelledExecutor
from instance.model.modelled_copier import ModelledCopier
from instance.request import FinishReason, Request, SamplingParams, Sequence
from instance.server import InstanceServer
from instance.step_cost import StepCost
from protos import generate_pb2 as pb
from protos import generate_pb2_grpc, migration_pb2_grpc
from protos import migration_pb2 as mpb

TOKEN = "secret"
MODEL = ModelDescription("m", "float32", 4, 2, 2, 8, 1000, 4096)
CONFIG = EngineConfig(
    heartbeat=0.1,
    report_interval=0.1,
    scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=64, max_model_len=4096),
    migration=MigrationConfig(
        reply_timeout=0.6, lease=1.0, claim_interval=0.05, grace=0.8, max_concurrent=4
    ),
    swap=SwapConfig(preemption=PreemptionMode.SWAP),
)


class Servers:
    """Instances by name, and one gateway over them."""

    def __init__(self) -> None:
        self.instances: dict[str, InstanceServer] = {}
        self.pinned: dict[str, str] = {}
        self.placer = FixedPlacer(lambda request: self.pinned[request.request_id])
        self.router = Router("home", TOKEN, self.placer, connect_timeout=0.5)
        self._numbers = itertools.count()

    async def add(
        self,
        name: str,
        model: ModelDescription = MODEL,
        blocks: int = 400,
        step: float = 0.004,
        host_blocks: int = 0,
    ) -> InstanceServer:
        clock = RealClock()
        copier = None
        if host_blocks:
            copier = ModelledCopier(host_blocks, 1 << 16, clock, lambda _, copies: 1e-4 * copies)
        cost = StepCost(step, 1e-6, 1e-6, 0.0)
        executor = ModelledExecutor(model, blocks, clock, cost, copier)
        server = InstanceServer(name, f"{name}-inc", executor, CONFIG, TOKEN)
        await server.start()
        self.instances[name] = server
        infos = [one.info for one in self.instances.values() if one.info is not None]
        self.placer.set_instances(infos)
        await asyncio.wait_for(self.router.wait_connected(len(infos)), 10)
        return server

    def submit(
        self, where: str, prompt: int = 30, tokens: int = 200, first: int = 0
    ) -> RequestStream:
        request_id = f"r{next(self._numbers)}"
        self.pinned[request_id] = where
        params = SamplingParams(seed=7, max_tokens=tokens, ignore_eos=True)
        ids = tuple(range(first, first + prompt))
        return self.router.submit(Request(request_id, ids, params, home="home", tenant="t"))

    async def move(self, stream: RequestStream, to: str) -> MigrationReport:
        source, info = self.instances[stream.holder or ""], self.instances[to].info
        assert info is not None
        return await asyncio.wait_for(source.migrate(stream.request_id, info, "test"), 10)

    async def idle(self) -> None:
        """Every block of every instance comes free, and the pools are sound."""
        for server in self.instances.values():
            for _ in range(400):
                if server.check()["used_blocks"] == 0 and not server.engine.scheduler.sequences:
                    break
                await asyncio.sleep(0.01)
            else:
                pytest.fail(f"blocks left on {server.instance_id}: {server.check()}")


@pytest.fixture
async def servers() -> AsyncIterator[Servers]:
    made = Servers()
    await made.router.start()
    yield made
    await made.router.close()
    for server in made.instances.values():
        await server.stop()


async def read(stream: RequestStream, until: int | None = None) -> list[int]:
    """Tokens up to the end, or at least ``until`` of them."""
    tokens: list[int] = []
    async for delta in stream:
        tokens += delta.tokens
        if until is not None and len(tokens) >= until:
            break
    return tokens


async def expected(servers: Servers, prompt: int = 30, tokens: int = 200) -> list[int]:
    name = next(iter(servers.instances))
    return await asyncio.wait_for(read(servers.submit(name, prompt, tokens)), 30)


async def test_a_move_leaves_the_stream_as_it_is(servers: Servers) -> None:
    await servers.add("a")
    await servers.add("b")
    want = await expected(servers)
    stream = servers.submit("a")
    tokens = await read(stream, 20)
    report = await servers.move(stream, "b")
    assert report.outcome == "moved"
    assert stream.holder == "b"
    tokens += await read(stream, 30)
    assert (await servers.move(stream, "a")).outcome == "moved"
    assert tokens + await read(stream) == want
    assert stream.migrations == 2
    await servers.idle()


async def test_many_move_at_once_both_ways(servers: Servers) -> None:
    await servers.add("a")
    await servers.add("b")
    want = await expected(servers, tokens=400)
    streams = [servers.submit("ab"[index % 2], tokens=400) for index in range(8)]
    heads = [await read(stream, 5) for stream in streams]
    reports = await asyncio.gather(
        *(servers.move(stream, "ba"[index % 2]) for index, stream in enumerate(streams))
    )
    assert [report.outcome for report in reports] == ["moved"] * 8
    tails = await asyncio.gather(*(read(stream) for stream in streams))
    assert [head + tail for head, tail in zip(heads, tails, strict=True)] == [want] * 8
    await servers.idle()


async def test_a_waiting_request_moves_without_kv(servers: Servers) -> None:
    small = await servers.add("a", blocks=42)
    await servers.add("b")
    first = servers.submit("a", prompt=60, tokens=100)
    await read(first, 1)
    waiting = servers.submit("a", prompt=120, tokens=30, first=500)
    while waiting.request_id not in small.engine.scheduler.sequences:
        await asyncio.sleep(0.001)
    assert small.engine.scheduler.waiting
    report = await servers.move(waiting, "b")
    assert (report.outcome, report.blocks) == ("moved", 0)
    assert len(await read(waiting)) == 30
    await read(first)
    await servers.idle()


async def test_a_swapped_out_request_moves_from_the_host(servers: Servers) -> None:
    tight = await servers.add("a", blocks=100, host_blocks=200)
    await servers.add("b")
    want = await expected(servers, prompt=60, tokens=200)
    first = servers.submit("a", prompt=90, tokens=280, first=500)
    await read(first, 1)
    victim = servers.submit("a", prompt=60, tokens=200)
    sequence = None
    while sequence is None or not sequence.num_swapped:
        await asyncio.sleep(0.001)
        sequence = tight.engine.scheduler.sequences.get(victim.request_id)
    kept = sequence.num_kept
    places: list[BlockPool] = []
    kv_of = tight.engine.kv_of

    def told(moving: Sequence) -> KvPlace:
        places.append(kv_of(moving).pool)
        return kv_of(moving)

    tight.engine.kv_of = told  # type: ignore[method-assign]
    report = await servers.move(victim, "b")
    assert (report.outcome, report.blocks) == ("moved", -(-kept // MODEL.block_size))
    swap = tight.engine.scheduler.swap
    assert swap is not None
    assert places
    assert all(pool is swap.host for pool in places)
    assert await read(victim) == want
    await read(first)
    await servers.idle()
    assert swap.host.num_free == swap.host.num_usable
    assert swap.figures.back == 0


async def test_reserve_is_refused_with_a_reason(servers: Servers) -> None:
    await servers.add("a")
    draining = await servers.add("draining")
    draining.reports.draining = True
    await servers.add("other", model=dataclasses.replace(MODEL, dtype="float64"))
    await servers.add("small", blocks=6)
    want = await expected(servers)
    stream = servers.submit("a")
    tokens = await read(stream, 10)
    for name, reason in (
        ("draining", "draining"),
        ("other", "another model"),
        ("small", "not enough free blocks"),
        ("a", "already there"),
    ):
        report = await servers.move(stream, name)
        assert reason in report.outcome
        tokens += await read(stream, 1)
    unknown = await servers.instances["a"].migrate("nonesuch", draining.info, "test")  # type: ignore[arg-type]
    assert unknown.outcome == "unknown request"
    assert tokens + await read(stream) == want
    assert stream.migrations == 0
    await servers.idle()


async def test_a_refusal_lets_go_of_the_prefix_that_was_there(servers: Servers) -> None:
    await servers.add("a")
    small = await servers.add("small", blocks=60)
    await read(servers.submit("small", prompt=60, tokens=2))
    stream = servers.submit("a", prompt=60, tokens=400)
    await read(stream, 200)
    report = await servers.move(stream, "small")
    assert "not enough free blocks" in report.outcome
    assert not small.migrations.held_blocks()
    assert small.engine.pool.num_free == small.engine.pool.num_usable
    stream.cancel()
    await servers.idle()


@pytest.mark.parametrize("at", ["Offer", "CopyBlocks", "Announce", "Handover"])
async def test_abort_at_any_stage(servers: Servers, at: str) -> None:
    await servers.add("a")
    await servers.add("b")
    stream = servers.submit("a", prompt=200, tokens=1000)
    await read(stream, 5)
    moving = asyncio.create_task(servers.move(stream, "b"))
    outgoing = servers.instances["a"].migrations._outgoing
    while not outgoing:
        await asyncio.sleep(0)
    (attempt,) = outgoing.values()
    execute = attempt._execute

    def cancel_at(actions: list[Any]) -> None:
        execute(actions)
        if any(at in repr(action) for action in actions):
            stream.cancel()

    attempt._execute = cancel_at  # type: ignore[method-assign]
    if at == "Offer":
        stream.cancel()
    report = await moving
    assert report.outcome != "moved" or at == "Handover"
    await servers.idle()
    assert servers.router.active == 0


async def test_destination_dies_in_a_move(servers: Servers) -> None:
    await servers.add("a")
    dying = await servers.add("b")
    want = await expected(servers, prompt=400, tokens=300)
    stream = servers.submit("a", prompt=400, tokens=300)
    tokens = await read(stream, 5)
    moving = asyncio.create_task(servers.move(stream, "b"))
    while not dying.migrations.num_in:
        await asyncio.sleep(0)
    await dying.stop()
    del servers.instances["b"]
    servers.pinned[stream.request_id] = "a"
    report = await moving
    tokens += await read(stream)
    assert tokens == want, report
    await servers.idle()


async def test_source_dies_after_a_move_began(servers: Servers) -> None:
    dying = await servers.add("a")
    await servers.add("b")
    want = await expected(servers, prompt=400, tokens=300)
    stream = servers.submit("a", prompt=400, tokens=300)
    tokens = await read(stream, 5)
    assert dying.info is not None
    moving = asyncio.create_task(servers.move(stream, "b"))
    await asyncio.sleep(0.002)
    servers.pinned[stream.request_id] = "b"
    await dying.stop()
    del servers.instances["a"]
    await asyncio.gather(moving, return_exceptions=True)
    assert tokens + await read(stream) == want
    await servers.idle()


async def test_a_home_that_is_gone_frees_everything(servers: Servers) -> None:
    server = await servers.add("a")
    orphan = Router("orphan", TOKEN, servers.placer, connect_timeout=0.5)
    servers.placer.on_view(lambda view: (servers.router._view_changed(view), None)[1])
    await orphan.start()
    await asyncio.wait_for(orphan.wait_connected(1), 5)
    servers.pinned["o1"] = "a"
    params = SamplingParams(max_tokens=1400, ignore_eos=True)
    stream = orphan.submit(Request("o1", (1, 2, 3), params, home="orphan"))
    await read(stream, 3)
    assert "o1" in server.engine.scheduler.sequences
    for link in orphan._links.values():
        await link.close()
    await servers.idle()
    assert "orphan" not in server._links
    await orphan.close()


async def test_a_broken_stream_loses_nothing(servers: Servers) -> None:
    server = await servers.add("a")
    want = await expected(servers, tokens=400)
    stream = servers.submit("a", tokens=400)
    tokens = await read(stream, 10)
    for _ in range(3):
        # The instance drops the stream; the gateway opens another one.
        link = server._links["home"]
        link.open()
        link.close(link.generation, 0.0)
        link.lost_at = RealClock().now()
        tokens += await read(stream, 20)
    assert tokens + await read(stream) == want
    assert stream.replays == 0
    await servers.idle()


@asynccontextmanager
async def channel(server: InstanceServer) -> AsyncIterator[grpc.aio.Channel]:
    assert server.info is not None
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(grpc.aio.insecure_channel(server.info.address))


@pytest.mark.parametrize("metadata", [(), wire.credentials("wrong")])
async def test_every_call_needs_the_cluster_token(servers: Servers, metadata: Any) -> None:
    server = await servers.add("a")
    async with channel(server) as opened:
        streams = (
            generate_pb2_grpc.GenerateStub(opened).Connect(metadata=metadata),
            migration_pb2_grpc.MigrationStub(opened).Control(metadata=metadata),
        )
        for call in streams:
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.aio.AioRpcError, match="cluster token"):
            await migration_pb2_grpc.MigrationStub(opened).Copy(
                iter([mpb.KvChunk(attempt="x")]), metadata=metadata
            )


async def test_another_protocol_version_is_refused(servers: Servers) -> None:
    server = await servers.add("a")
    async with channel(server) as opened:
        call = generate_pb2_grpc.GenerateStub(opened).Connect(metadata=wire.credentials(TOKEN))
        await call.write(pb.ToInstance(hello=pb.Hello(protocol=999, gateway_id="g")))
        assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "999" in (await call.details() or "")


async def test_a_request_that_can_never_fit_ends_with_the_reason(servers: Servers) -> None:
    await servers.add("a", blocks=10)
    stream = servers.submit("a", prompt=30, tokens=500)
    deltas = [delta async for delta in stream]
    assert deltas[-1].finish_reason is FinishReason.ERROR
    assert "blocks" in deltas[-1].message
    await servers.idle()


async def test_first_tokens_lead_the_frame_of_their_step(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await servers.add("a")
    frames: list[list[int]] = []
    received = servers.router.received

    def noted(link: InstanceLink, message: pb.ToGateway) -> None:
        if message.WhichOneof("message") == "frame":
            frames.append([part.index for part in message.frame.tokens])
        received(link, message)

    monkeypatch.setattr(servers.router, "received", noted)
    running = [servers.submit("a") for _ in range(3)]
    for stream in running:
        await asyncio.wait_for(read(stream, 5), 10)
    late = servers.submit("a")
    assert len(await asyncio.wait_for(read(late), 30)) == 200
    mixed = [frame for frame in frames[4:] if 0 in frame and max(frame) > 0]
    assert mixed
    assert all(frame[0] == 0 for frame in mixed)
