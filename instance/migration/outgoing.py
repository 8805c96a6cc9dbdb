"""Executes the source's side of a migration attempt on the engine and the wire."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import grpc.aio

from instance import wire
from instance.config import MigrationConfig
from instance.engine import KvPlace
from instance.load import MigrationReport
from instance.migration import messages as m
from instance.migration.codec import claim_to_wire
from instance.migration.host import MigrationHost
from instance.migration.source import CANCELLED, MOVED, SourceMigration
from instance.migration.transports.grpc import BandwidthShare, CopyStats, send_blocks
from instance.request import Sequence, SequenceStatus
from protos import migration_pb2 as pb

if TYPE_CHECKING:
    from instance.migration.peers import PeerLink

logger = logging.getLogger(__name__)


class OutgoingMigration:
    """One attempt to move a sequence away.

    Attributes:
        machine: The protocol's state.
        report: Resolved with how the attempt ended.
    """

    def __init__(
        self,
        host: MigrationHost,
        sequence: Sequence,
        peer: PeerLink,
        attempt: str,
        reason: str,
        config: MigrationConfig,
        share: BandwidthShare,
    ) -> None:
        self.sequence = sequence
        self.peer = peer
        self.machine = SourceMigration(
            attempt, sequence.request_id, sequence.epoch, sequence.request.home, config
        )
        self.report: asyncio.Future[MigrationReport] = asyncio.get_running_loop().create_future()
        self._host = host
        self._reason = reason
        self._config = config
        self._share = share
        self._started = host.clock.now()
        self._timer: asyncio.TimerHandle | None = None
        self._copies: set[asyncio.Task[None]] = set()
        # Counted as it leaves: the destination's word may overtake the end of the last call.
        self._sent = CopyStats()

    def start(self) -> None:
        """Offer the sequence to the destination."""
        now = self._host.clock.now()
        sequence = self.sequence
        has_kv = sequence.status is SequenceStatus.RUNNING or sequence.num_swapped > 0
        self._execute(self.machine.start(*self._blocks(), has_kv, now))

    def handle(self, event: m.SourceEvent) -> None:
        """Feed an event to the protocol and do what it says."""
        if self.machine.ended and isinstance(event, m.Released):
            self._resolve(MOVED)
            return
        self._execute(self.machine.handle(event, self._host.clock.now()))

    async def close(self) -> None:
        """Stop transfers at shutdown; the homes see to the request."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._copies:
            task.cancel()
        await asyncio.gather(*self._copies, return_exceptions=True)
        if not self.report.done():
            self._resolve("instance stopped")

    def _blocks(self) -> tuple[int, int]:
        """Sealed blocks, and blocks that hold KV."""
        size = self._host.engine.pool.block_size
        kept = self.sequence.num_kept
        return kept // size, -(-kept // size)

    def _execute(self, actions: list[m.SourceAction]) -> None:
        for action in actions:
            match action:
                case m.ToPeer(message):
                    self._send(message)
                case m.ToHome(claim):
                    self._host.send_home(self.machine.home, claim_to_wire(claim))
                case m.CopyBlocks(stage, first, count):
                    self._copy(stage, first, count)
                case m.Detach():
                    self._host.engine.detach(self.sequence, self._detached)
                case m.Resume(epoch, next_index):
                    self._resume(epoch, next_index)
                case m.FreeSequence():
                    self._host.engine.forget(self.sequence)
                    self._host.note_epoch(self.sequence.request_id, self.sequence.epoch)
                case m.Ended(outcome):
                    if self._timer is not None:
                        self._timer.cancel()
                    self._finish(outcome)
        self._schedule()

    def _schedule(self) -> None:
        if self.machine.ended:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self.machine.deadline()
        if due is not None:
            delay = max(0.0, due - self._host.clock.now())
            self._timer = asyncio.get_running_loop().call_later(
                delay, lambda: self.handle(m.Tick())
            )

    def _send(self, message: object) -> None:
        sequence = self.sequence
        match message:
            case m.Offer():
                self.peer.send(
                    pb.ToDestination(
                        offer=pb.Offer(
                            attempt=message.attempt,
                            request_id=message.request_id,
                            epoch=message.epoch,
                            home=message.home,
                            model=wire.model_to_wire(self._host.engine.model),
                            submit=wire.submit_to_wire(
                                sequence.request, message.epoch, sequence.output, ""
                            ),
                            num_blocks=message.num_blocks,
                        )
                    )
                )
            case m.Extend(attempt, num_blocks):
                self.peer.send(
                    pb.ToDestination(extend=pb.Extend(attempt=attempt, num_blocks=num_blocks))
                )
            case m.Announce(attempt, num_blocks):
                self.peer.send(
                    pb.ToDestination(announce=pb.Announce(attempt=attempt, num_blocks=num_blocks))
                )
            case m.CancelMigration(attempt, reason):
                self.peer.send(
                    pb.ToDestination(cancel=pb.CancelMigration(attempt=attempt, reason=reason))
                )
            case m.Handover():
                self.peer.send(
                    pb.ToDestination(
                        handover=pb.Handover(
                            attempt=message.attempt,
                            request_id=message.request_id,
                            epoch=message.epoch,
                            output=message.output,
                            num_computed=message.num_computed,
                            num_blocks=message.num_blocks,
                            acked=message.acked,
                            num_stages=message.num_stages,
                            cached_tokens=sequence.num_cached if sequence.num_cached >= 0 else None,
                            charged=wire.charged_to_wire(sequence),
                            logprobs=wire.logprobs_to_wire(message.logprobs),
                        )
                    )
                )

    # ---- copies

    def _copy(self, stage: int, first: int, count: int) -> None:
        place = self._host.engine.kv_of(self.sequence)
        blocks = place.table[first : first + count]
        place.pool.pin(blocks)
        task = asyncio.create_task(self._transfer(stage, first, blocks, place))
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)

    async def _transfer(self, stage: int, first: int, blocks: list[int], place: KvPlace) -> None:
        engine = self._host.engine
        ok = False
        try:
            await send_blocks(
                self.peer.stub,
                self.peer.metadata,
                place.kv,
                attempt=self.machine.attempt,
                stage=stage,
                first=first,
                blocks=blocks,
                chunk_bytes=self._config.chunk_bytes,
                # The tail is waited for, so it takes no turn behind other copies.
                share=None if self.sequence.status is SequenceStatus.HANDOVER else self._share,
                timeout=max(self._config.reply_timeout, 60.0),
                stats=self._sent,
            )
            ok = True
        except (grpc.aio.AioRpcError, ConnectionError) as error:
            logger.info("stage %d of %s: %s", stage, self.machine.attempt, error)
        except Exception:
            # The protocol has no timer here: it must hear of the end, whatever the fault.
            logger.exception("stage %d of %s", stage, self.machine.attempt)
        finally:
            place.pool.unpin(blocks)
            engine.wake()
        self.handle(m.CopyDone(stage, ok, *self._blocks()))

    # ---- the sequence

    def _detached(self, taken_out: bool) -> None:
        if self.machine.ended:
            # Freed by the home's word meanwhile; nothing may be left behind.
            if taken_out:
                self._host.engine.forget(self.sequence)
            return
        if not taken_out:
            self.handle(m.DetachFailed())
            return
        sequence = self.sequence
        self.handle(
            m.Detached(
                total_blocks=self._blocks()[1],
                num_computed=sequence.num_kept,
                output=tuple(sequence.output),
                acked=sequence.acked,
                logprobs=sequence.logprobs_since(sequence.acked),
            )
        )

    def _resume(self, epoch: int, next_index: int | None) -> None:
        sequence = self.sequence
        sequence.epoch = epoch
        self._host.note_epoch(sequence.request_id, epoch)
        self._host.engine.put_back(sequence)
        if next_index is not None:
            self._host.resend(sequence, next_index)

    def _finish(self, outcome: str) -> None:
        if self.machine.detached_at is None or outcome != CANCELLED:
            self._resolve(outcome)
            return
        # The home voids the old epoch as soon as a stale frame or holding shows it, which
        # may be before the destination's release arrives: that tells a move from an abort.
        self._timer = asyncio.get_running_loop().call_later(
            self._config.reply_timeout, self._resolve, outcome
        )

    def _resolve(self, outcome: str) -> None:
        machine, now = self.machine, self._host.clock.now()
        detached = machine.detached_at
        if not self.report.done():
            self.report.set_result(
                MigrationReport(
                    request_id=machine.request_id,
                    attempt=machine.attempt,
                    source=self._host.instance_id,
                    destination=self.peer.info.instance_id,
                    reason=self._reason,
                    outcome=outcome,
                    stages=machine.stages,
                    blocks=machine.blocks_sent,
                    bytes_copied=self._sent.bytes,
                    copies=self._sent.copies,
                    duration=now - self._started,
                    detached=0.0 if detached is None else now - detached,
                )
            )
        self._host.reports.soon()
