"""The gRPC server of an instance: streams to homes, migration and heartbeats."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio

from instance import wire
from instance.clock import RealClock
from instance.config import EngineConfig
from instance.engine import Engine
from instance.executor import Executor
from instance.homes import HomeLink, tokens_message
from instance.leases import LeasedCounters, LedgerUpdate
from instance.load import InstanceInfo, MigrationFigures, MigrationReport
from instance.migration.coordinator import MigrationCoordinator
from instance.migration.epochs import EpochRegistry, SubmitDecision
from instance.reporting import LoadReports, Reporter
from instance.request import FinishReason, Sequence, SequenceStatus
from instance.scheduler import Emission
from protos import generate_pb2 as pb
from protos import generate_pb2_grpc, migration_pb2_grpc

logger = logging.getLogger(__name__)


class InstanceServer(generate_pb2_grpc.GenerateServicer):
    """One model replica behind gRPC. Everything runs on the event loop that starts it.

    Args:
        instance_id: Name of the instance in the cluster.
        incarnation: Unique to this start of it.
        executor: Runs the steps.
        config: Settings.
        token: Cluster token that every call must carry.
        host: Address to bind and to advertise.
        reporter: Told of the start and, from then on, of the load; must not block.
        on_failure: Told when the executor failed and the instance can serve no more.
    """

    def __init__(
        self,
        instance_id: str,
        incarnation: str,
        executor: Executor,
        config: EngineConfig,
        token: str,
        host: str = "127.0.0.1",
        reporter: Reporter | None = None,
        on_failure: Callable[[BaseException], None] | None = None,
        node: str = "",
    ) -> None:
        self.instance_id = instance_id
        self.incarnation = incarnation
        self._config = config
        self._token = token
        self._host = host
        self._node = node
        self._reporter = reporter
        self._failure = on_failure
        self.clock = RealClock()
        self._loop = asyncio.get_running_loop()
        self.counters = LeasedCounters()
        self.engine = Engine(
            executor,
            config,
            self.clock,
            self._post,
            self._step_ended,
            self._executor_failed,
            lambda sequence: self.migrations.preempted(sequence),
            self.counters,
        )
        self._links: dict[str, HomeLink] = {}
        self._epochs = EpochRegistry(config.migration.grace)
        self.migrations: MigrationCoordinator = MigrationCoordinator(self, config.migration, token)
        self._grpc: grpc.aio.Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.reports = LoadReports(
            instance_id,
            incarnation,
            self.engine,
            self.counters,
            self._migration_figures,
            config.report_interval,
            reporter,
        )
        self.info: InstanceInfo | None = None

    # ---- life

    async def start(self, port: int = 0) -> InstanceInfo:
        """Bind, serve and report the start. Raises OSError if the port cannot be bound."""
        server = grpc.aio.server(
            interceptors=[wire.TokenInterceptor(self._token)], options=wire.SERVER_OPTIONS
        )
        generate_pb2_grpc.add_GenerateServicer_to_server(self, server)
        migration_pb2_grpc.add_MigrationServicer_to_server(self.migrations, server)
        try:
            bound = server.add_insecure_port(f"{self._host}:{port}")
        except RuntimeError as error:
            raise OSError(f"cannot bind {self._host}:{port}: {error}") from error
        await server.start()
        self._grpc = server
        self.info = InstanceInfo(
            instance_id=self.instance_id,
            incarnation=self.incarnation,
            address=f"{self._host}:{bound}",
            node=self._node,
            model=self.engine.model,
            total_blocks=self.engine.pool.num_usable,
            max_num_seqs=self._config.scheduler.max_num_seqs,
            pid=os.getpid(),
        )
        self._tasks = [
            asyncio.create_task(self._heartbeat()),
            asyncio.create_task(self.reports.run()),
        ]
        if self._reporter is not None:
            self._reporter(self.info)
        return self.info

    async def stop(self) -> None:
        """Close every stream and stop the loop; running requests are left to their homes."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.migrations.close()
        if self._grpc is not None:
            await self._grpc.stop(0.2)
        await self._loop.run_in_executor(None, self.engine.executor.close)

    def _post(self, call: Callable[[], None]) -> None:
        # The loop may be closed under a step that was still running at shutdown.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call)

    def _executor_failed(self, error: BaseException) -> None:
        logger.critical("the executor failed; this instance stops serving", exc_info=error)
        if self._failure is not None:
            self._failure(error)

    # ---- streams to homes

    async def Connect(
        self,
        request_iterator: AsyncIterator[pb.ToInstance],
        context: grpc.aio.ServicerContext[pb.ToInstance, pb.ToGateway],
    ) -> None:
        """Serve one gateway's stream until it or the gateway goes."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("message") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message is a hello")
            return
        hello = first.hello
        if hello.protocol != wire.PROTOCOL_VERSION:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"protocol {hello.protocol} offered, {wire.PROTOCOL_VERSION} spoken here",
            )
        link = self._links.setdefault(hello.gateway_id, HomeLink(hello.gateway_id))
        generation = link.open()
        reader: asyncio.Task[None] | None = None
        try:
            await context.write(
                pb.ToGateway(
                    welcome=pb.Welcome(
                        protocol=wire.PROTOCOL_VERSION,
                        instance_id=self.instance_id,
                        incarnation=self.incarnation,
                        model=wire.model_to_wire(self.engine.model),
                    )
                )
            )
            await context.write(self._holdings(link))
            self.migrations.home_connected(link.gateway_id)
            reader = asyncio.create_task(self._read(link, generation, request_iterator))
            while (messages := await link.next_messages(generation)) is not None:
                for message in messages:
                    await context.write(message)
        finally:
            link.close(generation, self.clock.now())
            if reader is not None:
                reader.cancel()

    async def _read(
        self, link: HomeLink, generation: int, messages: AsyncIterator[pb.ToInstance]
    ) -> None:
        try:
            async for message in messages:
                if generation != link.generation:
                    return
                self._from_home(link, message)
        except grpc.RpcError:
            pass  # a broken stream and a closed one are the same here
        finally:
            link.close(generation, self.clock.now())

    def _from_home(self, link: HomeLink, message: pb.ToInstance) -> None:
        kind = message.WhichOneof("message")
        if kind == "ack":
            link.acknowledge(message.ack.frame)
        elif kind == "submit":
            link.submits += 1
            self._submit(link, message.submit)
        elif kind == "cancel":
            self.cancel(message.cancel.request_id, message.cancel.epoch)
        elif kind == "claim_reply":
            self.migrations.claim_reply(message.claim_reply)
        elif kind == "ask":
            self._tell(link, message.ask)

    def _submit(self, link: HomeLink, submit: pb.Submit) -> None:
        request_id, epoch = submit.request_id, submit.epoch
        running = self.engine.scheduler.sequences.get(request_id)
        coming = self.migrations.live_epoch(request_id)
        live = coming if running is None else running.epoch
        decision = self._epochs.decide(
            request_id, epoch, live, submit.incarnation == self.incarnation, self.clock.now()
        )
        if decision is SubmitDecision.IGNORE:
            return
        if decision is SubmitDecision.LOST:
            link.send(pb.ToGateway(lost=pb.Lost(request_id=request_id, epoch=epoch)))
            return
        if live is not None:
            self.cancel(request_id, epoch - 1)
        sequence = Sequence.start(
            wire.request_from_wire(submit, link.gateway_id),
            epoch=epoch,
            emitted=tuple(submit.emitted),
            eos_token_ids=self.engine.model.eos_token_ids,
        )
        wire.take_charged(sequence, submit.charged)
        try:
            self.engine.submit(sequence)
        except ValueError as error:
            sequence.finish_reason = FinishReason.ERROR
            link.send_tokens(
                sequence,
                tokens_message(sequence, sequence.num_output, (), FinishReason.ERROR, str(error)),
            )
        self.reports.soon()

    def cancel(self, request_id: str, epoch: int) -> None:
        """End what is held of a request up to this epoch and remember that it is void."""
        self._epochs.note(request_id, epoch, self.clock.now())
        self.migrations.cancelled(request_id, epoch)
        sequence = self.engine.scheduler.sequences.get(request_id)
        if sequence is not None and sequence.epoch <= epoch:
            self.engine.abort(request_id)
        for link in self._links.values():
            ended = link.ended.get(request_id)
            if ended is not None and ended.epoch <= epoch:
                del link.ended[request_id]
        self.reports.soon()

    def _tell(self, link: HomeLink, ask: pb.Ask) -> None:
        sequence = self.engine.scheduler.sequences.get(ask.request_id) or link.ended.get(
            ask.request_id
        )
        if sequence is None or sequence.epoch != ask.epoch:
            link.send(pb.ToGateway(lost=pb.Lost(request_id=ask.request_id, epoch=ask.epoch)))
            return
        sequence.acknowledge(min(ask.index, sequence.num_output))
        if not self.migrations.silent(sequence):
            self.resend(sequence, ask.index)

    def _holdings(self, link: HomeLink) -> pb.ToGateway:
        held = [
            sequence
            for sequence in self.engine.scheduler.sequences.values()
            if sequence.request.home == link.gateway_id
        ]
        return pb.ToGateway(
            holdings=pb.Holdings(
                submits=link.submits,
                holdings=[
                    pb.Holding(
                        request_id=sequence.request_id,
                        epoch=sequence.epoch,
                        state=(
                            SequenceStatus.HANDOVER
                            if self.migrations.silent(sequence)
                            else sequence.status
                        ),
                        next_index=sequence.num_output,
                        charged=wire.charged_to_wire(sequence),
                    )
                    for sequence in (*held, *link.ended.values())
                ],
            )
        )

    # ---- steps

    def _step_ended(self, emissions: list[Emission]) -> None:
        # A step's tokens reach their clients one after the other: first tokens lead.
        for emission in sorted(emissions, key=_is_later):
            sequence, reason = emission.sequence, emission.finish_reason
            if self.migrations.silent(sequence):
                continue
            link = self._links.get(sequence.request.home)
            if link is not None:
                link.send_tokens(
                    sequence,
                    tokens_message(
                        sequence,
                        emission.index,
                        emission.tokens,
                        reason,
                        sequence.error,
                        emission.logprobs,
                    ),
                )
            if reason:
                self.note_epoch(sequence.request_id, sequence.epoch)
                self.reports.soon()
        self.migrations.step_ended(emissions)
        self.reports.step_ended()

    # ---- what the migration coordinator needs

    def home_reachable(self, gateway_id: str) -> bool:
        """A live stream to this gateway exists."""
        link = self._links.get(gateway_id)
        return link is not None and link.connected

    def send_home(self, gateway_id: str, message: pb.ToGateway) -> None:
        """Queue a message for a gateway; dropped if its stream is down."""
        link = self._links.get(gateway_id)
        if link is not None:
            link.send(message)

    def resend(self, sequence: Sequence, index: int, message: str = "") -> None:
        """Send the sequence's output from ``index`` on, and its end if it has ended."""
        link = self._links.get(sequence.request.home)
        if link is None:
            return
        tokens = sequence.output[index:]
        link.send_tokens(
            sequence,
            tokens_message(
                sequence,
                index,
                tokens,
                sequence.finish_reason,
                message or sequence.error,
                sequence.logprobs_since(index),
            ),
        )

    def offer_epoch(self, request_id: str, epoch: int) -> bool:
        """False if a newer epoch than this was seen here."""
        return self._epochs.accepts_offer(request_id, epoch)

    def note_epoch(self, request_id: str, epoch: int) -> None:
        """Remember an epoch as seen."""
        self._epochs.note(request_id, epoch, self.clock.now())

    # ---- life and death of homes

    async def _heartbeat(self) -> None:
        grace = self._config.migration.grace
        while True:
            await asyncio.sleep(self._config.heartbeat)
            now = self.clock.now()
            self._epochs.expire(now)
            self.migrations.expire(now)
            for link in list(self._links.values()):
                if link.connected:
                    link.send(self._holdings(link))
                elif link.lost_at is not None and now - link.lost_at > grace:
                    self._bury(link.gateway_id)

    def _bury(self, gateway_id: str) -> None:
        """A home is gone for good, and so are its clients: end what it owned."""
        del self._links[gateway_id]
        self.migrations.home_gone(gateway_id)
        owned = [
            sequence
            for sequence in self.engine.scheduler.sequences.values()
            if sequence.request.home == gateway_id
        ]
        for sequence in owned:
            self.cancel(sequence.request_id, sequence.epoch)
        logger.warning("gateway %s is gone; ended its %d requests", gateway_id, len(owned))

    # ---- what the actor needs

    def take_ledger(self, incarnation: str, update: LedgerUpdate) -> None:
        """Take over what is new in the cluster's ledger; one for an older start is ignored."""
        if incarnation == self.incarnation:
            self.counters.take(update)

    def _migration_figures(self) -> MigrationFigures:
        migrations = self.migrations
        return MigrationFigures(
            involves=migrations.involves,
            reserved_blocks=migrations.reserved_blocks,
            num_out=migrations.num_out,
            num_in=migrations.num_in,
        )

    async def migrate(
        self, request_id: str, destination: InstanceInfo, reason: str
    ) -> MigrationReport:
        """Move a request held here; returns when the attempt has ended."""
        return await self.migrations.start_attempt(request_id, destination, reason)

    def check(self) -> dict[str, Any]:
        """Integrity and use of the block pool; raises IntegrityError if it is broken."""
        self.engine.scheduler.check_integrity(self.migrations.held_blocks())
        pool = self.engine.pool
        return {
            "instance": self.instance_id,
            "used_blocks": pool.num_usable - pool.num_free,
            "free_blocks": pool.num_free,
            "sequences": len(self.engine.scheduler.sequences),
            "migrations": self.migrations.num_in + self.migrations.num_out,
            "steps": self.engine.steps,
            "step_seconds": self.engine.step_seconds,
        }


def _is_later(emission: Emission) -> bool:
    return emission.index > 0
