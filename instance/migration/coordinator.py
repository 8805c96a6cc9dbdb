"""All migrations of one instance, outgoing and incoming, and their gRPC service."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator

import grpc
import grpc.aio

from instance import wire
from instance.config import MigrationConfig
from instance.load import InstanceInfo, MigrationReport
from instance.migration import messages as m
from instance.migration.codec import claim_reply_from_wire, control_from_destination
from instance.migration.host import MigrationHost
from instance.migration.incoming import IncomingMigration
from instance.migration.outgoing import OutgoingMigration
from instance.migration.peers import PeerLink
from instance.migration.transports.grpc import BandwidthShare
from instance.request import Sequence, SequenceStatus
from instance.scheduler import Emission
from protos import generate_pb2 as gen
from protos import migration_pb2 as pb
from protos import migration_pb2_grpc

logger = logging.getLogger(__name__)


class MigrationCoordinator(migration_pb2_grpc.MigrationServicer):
    """Finds the attempt that an event belongs to; decides nothing itself."""

    def __init__(self, host: MigrationHost, config: MigrationConfig, token: str) -> None:
        self._host = host
        self._config = config
        self._token = token
        self._share = BandwidthShare(config.max_bytes_per_second)
        self._peers: dict[tuple[str, str], PeerLink] = {}
        self._outgoing: dict[str, OutgoingMigration] = {}
        self._incoming: dict[str, IncomingMigration] = {}

    # ---- figures

    @property
    def num_out(self) -> int:
        return len(self._outgoing)

    @property
    def num_in(self) -> int:
        return sum(1 for one in self._incoming.values() if not one.machine.ended)

    @property
    def reserved_blocks(self) -> int:
        """Blocks that incoming attempts hold outside the scheduler."""
        return sum(len(one.table) for one in self._incoming.values() if one.sequence is None)

    def held_blocks(self) -> list[int]:
        """References to blocks outside the scheduler's sequences, one entry each."""
        return [block for one in self._incoming.values() for block in one.held]

    def silent(self, sequence: Sequence) -> bool:
        """The sequence may neither emit nor be charged: its home has not yet decided."""
        return any(one.sequence is sequence and one.machine.silent for one in self._attempts())

    def involves(self, request_id: str) -> bool:
        """The request takes part in an attempt here."""
        return self.live_epoch(request_id) is not None or any(
            one.machine.request_id == request_id for one in self._outgoing.values()
        )

    def live_epoch(self, request_id: str) -> int | None:
        """Epoch under which a request is coming in; None if it is not."""
        for one in self._incoming.values():
            if one.machine.request_id == request_id and one.machine.live:
                return one.machine.epoch
        return None

    def _attempts(self) -> list[OutgoingMigration | IncomingMigration]:
        return [*self._outgoing.values(), *self._incoming.values()]

    # ---- events from the instance

    async def start_attempt(
        self, request_id: str, destination: InstanceInfo, reason: str
    ) -> MigrationReport:
        """Move a request; returns when the attempt has ended, whatever its outcome."""
        sequence = self._host.engine.scheduler.sequences.get(request_id)
        refusal = self._cannot_leave(sequence, destination)
        if refusal or sequence is None:
            return MigrationReport(
                request_id,
                "",
                self._host.instance_id,
                destination.instance_id,
                reason,
                refusal,
            )
        attempt = OutgoingMigration(
            self._host,
            sequence,
            self._peer(destination),
            uuid.uuid4().hex,
            reason,
            self._config,
            self._share,
        )
        name = attempt.machine.attempt
        self._outgoing[name] = attempt
        attempt.report.add_done_callback(lambda _: self._outgoing.pop(name, None))
        attempt.start()
        self._host.reports.soon()
        return await asyncio.shield(attempt.report)

    def _cannot_leave(self, sequence: Sequence | None, destination: InstanceInfo) -> str:
        if sequence is None:
            return "unknown request"
        if destination.instance_id == self._host.instance_id:
            return "already there"
        if sequence.status is SequenceStatus.HANDOVER:
            return "in handover already"
        if not self._host.engine.scheduler.can_leave(sequence):
            return "being swapped"
        if self.involves(sequence.request_id):
            return "migrating already"
        if len(self._outgoing) >= self._config.max_concurrent:
            return "too many migrations from here"
        return ""

    def step_ended(self, emissions: list[Emission]) -> None:
        """Tell attempts of the sequences that finished."""
        if not self._outgoing:
            return
        for emission in emissions:
            if emission.finish_reason:
                self._tell_source(emission.sequence, m.SequenceEnded())

    def preempted(self, sequence: Sequence) -> None:
        """The sequence lost its KV."""
        self._tell_source(sequence, m.Preempted())

    def _tell_source(self, sequence: Sequence, event: m.SourceEvent) -> None:
        for one in list(self._outgoing.values()):
            if one.sequence is sequence:
                one.handle(event)

    def cancelled(self, request_id: str, epoch: int) -> None:
        """The home voided this epoch of the request and all older ones."""
        for one in self._attempts():
            if one.machine.request_id == request_id:
                one.handle(m.Cancelled(epoch))

    def claim_reply(self, wire_reply: gen.ClaimReply) -> None:
        """The home answered a claim."""
        reply = claim_reply_from_wire(wire_reply)
        one = self._outgoing.get(reply.attempt) or self._incoming.get(reply.attempt)
        if one is not None:
            one.handle(reply)

    def home_connected(self, gateway_id: str) -> None:
        """A new stream to a home is up."""
        self._tell_home_event(gateway_id, m.HomeConnected())

    def home_gone(self, gateway_id: str) -> None:
        """A home counts as dead."""
        self._tell_home_event(gateway_id, m.HomeGone())

    def _tell_home_event(self, gateway_id: str, event: m.HomeConnected | m.HomeGone) -> None:
        for one in self._attempts():
            if one.machine.home == gateway_id:
                one.handle(event)

    def expire(self, now: float) -> None:
        """Forget attempts that ended long ago."""
        for name, one in list(self._incoming.items()):
            forget_at = one.machine.forget_at
            if forget_at is not None and now >= forget_at:
                del self._incoming[name]

    async def close(self) -> None:
        for outgoing in list(self._outgoing.values()):
            await outgoing.close()
        for incoming in self._incoming.values():
            incoming.close()
        for peer in list(self._peers.values()):
            await peer.close()

    # ---- as source

    def _peer(self, info: InstanceInfo) -> PeerLink:
        key = (info.instance_id, info.incarnation)
        peer = self._peers.get(key)
        if peer is None or peer.broken:
            greeting = pb.Peer(
                protocol=wire.PROTOCOL_VERSION,
                instance_id=self._host.instance_id,
                incarnation=self._host.incarnation,
            )
            peer = PeerLink(info, self._token, greeting, self._from_destination, self._peer_lost)
            self._peers[key] = peer
        return peer

    def _from_destination(self, wire_message: pb.ToSource) -> None:
        message = control_from_destination(wire_message)
        if message is not None:
            attempt = self._outgoing.get(message.attempt)
            if attempt is not None:
                attempt.handle(message)

    def _peer_lost(self, peer: PeerLink) -> None:
        key = (peer.info.instance_id, peer.info.incarnation)
        if self._peers.get(key) is peer:
            del self._peers[key]
        for one in list(self._outgoing.values()):
            if one.peer is peer:
                one.handle(m.PeerLost())

    # ---- as destination

    async def Control(
        self,
        request_iterator: AsyncIterator[pb.ToDestination],
        context: grpc.aio.ServicerContext[pb.ToDestination, pb.ToSource],
    ) -> None:
        """Serve the control stream of one source."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("message") != "hello":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message is a hello")
            return
        if first.hello.protocol != wire.PROTOCOL_VERSION:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"protocol {first.hello.protocol} offered, {wire.PROTOCOL_VERSION} spoken here",
            )
        outbox: asyncio.Queue[pb.ToSource] = asyncio.Queue()
        outbox.put_nowait(
            pb.ToSource(
                hello=pb.Peer(
                    protocol=wire.PROTOCOL_VERSION,
                    instance_id=self._host.instance_id,
                    incarnation=self._host.incarnation,
                )
            )
        )

        async def write() -> None:
            while True:
                await context.write(await outbox.get())

        writer = asyncio.create_task(write())
        attempts: set[str] = set()
        try:
            with contextlib.suppress(grpc.RpcError):
                async for message in request_iterator:
                    self._from_source(message, outbox, attempts)
        finally:
            writer.cancel()
            for name in attempts:
                attempt = self._incoming.get(name)
                if attempt is not None:
                    attempt.handle(m.PeerLost())

    def _from_source(
        self, message: pb.ToDestination, outbox: asyncio.Queue[pb.ToSource], attempts: set[str]
    ) -> None:
        kind = message.WhichOneof("message")
        if kind == "offer":
            name = message.offer.attempt
            attempts.add(name)
            if name not in self._incoming:
                attempt = IncomingMigration(
                    self._host, message.offer, outbox.put_nowait, self._admit, self._config
                )
                self._incoming[name] = attempt
                attempt.start()
        elif kind == "handover":
            known = self._incoming.get(message.handover.attempt)
            if known is None:
                # Never heard of, or forgotten: the source may claim the request at once.
                cancel = pb.CancelMigration(
                    attempt=message.handover.attempt, reason="unknown attempt"
                )
                outbox.put_nowait(pb.ToSource(cancel=cancel))
            else:
                known.take_handover(message.handover)
        elif kind in ("extend", "announce", "cancel"):
            body = getattr(message, kind)
            known = self._incoming.get(body.attempt)
            if known is None:
                return
            if kind == "extend":
                known.handle(m.Extend(body.attempt, body.num_blocks))
            elif kind == "announce":
                known.handle(m.Announce(body.attempt, body.num_blocks))
            else:
                known.handle(m.CancelMigration(body.attempt, body.reason))

    def _admit(self, attempt: IncomingMigration) -> str:
        """Why an offer cannot be taken; "" if it can."""
        host, machine = self._host, attempt.machine
        engine = host.engine
        if host.reports.draining:
            return "draining"
        if attempt.model != wire.model_to_wire(engine.model):
            return "another model, type or block size"
        if not host.home_reachable(machine.home):
            return "no stream to the request's home"
        if not host.offer_epoch(machine.request_id, machine.epoch):
            return "a newer epoch is known here"
        if machine.request_id in engine.scheduler.sequences or any(
            one is not attempt
            and one.machine.request_id == machine.request_id
            and not one.machine.ended
            for one in self._incoming.values()
        ):
            return "the request is here already"
        if self.num_in > self._config.max_concurrent:
            return "too many migrations to here"
        if len(engine.scheduler.running) + self.num_in > engine.scheduler.max_num_seqs:
            return "no batch slot"
        return ""

    async def Copy(
        self,
        request_iterator: AsyncIterator[pb.KvChunk],
        context: grpc.aio.ServicerContext[pb.KvChunk, pb.CopyReply],
    ) -> pb.CopyReply:
        """Write the blocks of one copy stage."""
        attempt: IncomingMigration | None = None
        name, stage, complete = "", 0, False
        try:
            async for chunk in request_iterator:
                if attempt is None:
                    name, stage = chunk.attempt, chunk.stage
                    found = self._incoming.get(name)
                    if found is None or not found.copy_started(stage):
                        break
                    attempt = found
                attempt.write(chunk)
                complete = chunk.last
        except ValueError as error:
            logger.error("migration %s, stage %d: %s", name, stage, error)
            complete = False
        finally:
            if attempt is not None:
                attempt.handle(m.CopyEnded(stage, complete))
        return pb.CopyReply(attempt=name, stage=stage, written=attempt is not None and complete)
