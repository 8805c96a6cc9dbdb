"""Executes the destination's side of a migration attempt on the engine and the wire."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Callable

from instance import wire
from instance.config import MigrationConfig
from instance.kv.prefix import extend_hashes
from instance.migration import messages as m
from instance.migration.codec import claim_to_wire, control_to_source, handover_from_wire
from instance.migration.destination import DestinationMigration
from instance.migration.host import MigrationHost
from instance.migration.transports.grpc import write_chunk
from instance.request import FinishReason, Sequence
from protos import migration_pb2 as pb

logger = logging.getLogger(__name__)


class IncomingMigration:
    """One attempt of a source to hand a sequence over to this instance.

    Args:
        host: The instance.
        offer: As received.
        send: Sends a control message to the source; drops it where there is no stream.
        admit: Says why the offer cannot be taken, or "".
        config: Limits.

    Attributes:
        machine: The protocol's state.
        table: Pool blocks by index in the sequence's block table.
    """

    def __init__(
        self,
        host: MigrationHost,
        offer: pb.Offer,
        send: Callable[[pb.ToSource], None],
        admit: Callable[[IncomingMigration], str],
        config: MigrationConfig,
    ) -> None:
        self.machine = DestinationMigration(
            m.Offer(offer.attempt, offer.request_id, offer.epoch, offer.home, offer.num_blocks),
            config,
        )
        self.send = send
        self.table: list[int] = []
        self.num_acquired = 0
        self.sequence: Sequence | None = None
        self._host = host
        self._offer = offer
        # Read with the offer, so that the handover of a long prompt takes no longer.
        self._request = wire.request_from_wire(offer.submit, offer.home)
        self._admit = admit
        self._admitted = False
        self._handover: pb.Handover | None = None
        self._error = ""
        self._rejected: set[int] = set()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def model(self) -> object:
        """The source's model, as offered."""
        return self._offer.model

    @property
    def num_reserved(self) -> int:
        """Blocks reserved and not yet the sequence's."""
        return len(self.table) - self.num_acquired if self.sequence is None else 0

    @property
    def held(self) -> list[int]:
        """Cached blocks counted on: references outside the scheduler. An ended attempt has none
        by right, so that a check finds those it forgot."""
        counted = self.sequence is None and not self.machine.ended
        return self.table[: self.num_acquired] if counted else []

    def start(self) -> None:
        """Answer the offer, at the next step boundary."""
        grammar = self._request.params.grammar
        if grammar is not None:
            # Compiled while blocks are copied; the handover meets it ready, or its error.
            self._host.engine.executor.prepare(grammar, lambda _: None)
        self._execute(self.machine.start())

    def handle(self, event: m.DestinationEvent) -> None:
        """Feed an event to the protocol and do what it says."""
        self._execute(self.machine.handle(event, self._host.clock.now()))

    def take_handover(self, handover: pb.Handover) -> None:
        """The source handed the sequence over."""
        if self._handover is None:
            self._handover = handover
        self.handle(handover_from_wire(handover))

    def copy_started(self, stage: int) -> bool:
        """A stage is about to be written; false if nothing of it may be."""
        self._rejected.discard(stage)
        self.handle(m.CopyStarted(stage))
        return stage not in self._rejected

    def write(self, chunk: pb.KvChunk) -> None:
        """Write one chunk. Raises ValueError if it lies outside the reservation."""
        kv = self._host.engine.executor.kv
        if kv is not None:
            write_chunk(kv, chunk, self.table)
        self.handle(m.CopyProgress())

    def close(self) -> None:
        """Forget timers at shutdown."""
        if self._timer is not None:
            self._timer.cancel()

    def _execute(self, actions: list[m.DestinationAction]) -> None:
        for action in actions:
            match action:
                case m.ToPeer(message):
                    self.send(control_to_source(message))
                case m.ToHome(claim):
                    self._host.send_home(self.machine.home, claim_to_wire(claim))
                case m.Reserve(num_blocks):
                    self._host.engine.when_blocks_are_safe(
                        functools.partial(self._reserve, num_blocks)
                    )
                case m.FreeReservation():
                    self._free()
                case m.StartCompute(handover):
                    self._compute(handover)
                case m.Activate(epoch, next_index):
                    self._activate(epoch, next_index)
                case m.DropSequence():
                    if self.sequence is not None:
                        self._host.engine.forget(self.sequence)
                case m.RejectCopy(stage):
                    self._rejected.add(stage)
                case m.ExpectHandover():
                    pass  # the scheduler's patch gives a late arrival its row
                case m.Ended(outcome):
                    logger.debug("migration %s ended here: %s", self.machine.attempt, outcome)
                    self._host.reports.soon()
        self._schedule()

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self.machine.deadline()
        if due is not None:
            delay = max(0.0, due - self._host.clock.now())
            self._timer = asyncio.get_running_loop().call_later(
                delay, lambda: self.handle(m.Tick())
            )

    # ---- blocks

    def _reserve(self, wanted: int) -> None:
        """Answer an offer or an extension; no launched step can still touch a free block."""
        engine = self._host.engine
        first = not self._admitted
        if first:
            refusal = self._admit(self)
            if refusal:
                self.handle(m.ReserveResult(False, reason=refusal))
                return
            self._admitted = True
            if wanted:
                self._acquire_cached(wanted)
        missing = wanted - len(self.table)
        if missing > 0:
            # One block stays free for each running sequence, as for an admission.
            spare = len(engine.scheduler.running)
            blocks = None
            if engine.pool.num_free >= missing + spare:
                blocks = engine.pool.reserve(missing, self.table[-1] if self.table else None)
            if blocks is None:
                if first:
                    self._free()  # the protocol knows of none yet
                self.handle(m.ReserveResult(False, reason="not enough free blocks"))
                return
            self.table.extend(blocks)
        self.handle(m.ReserveResult(True, self.num_acquired))

    def _acquire_cached(self, wanted: int) -> None:
        """Count on the leading blocks that the prefix cache has already."""
        engine = self._host.engine
        if not engine.prefix_caching:
            return
        tokens = [*self._request.prompt, *self._offer.submit.emitted]
        hashes: list[bytes] = []
        size = engine.pool.block_size
        extend_hashes(hashes, tokens, size, engine.salt)
        # The last token's KV is never computed yet, and at least one block is written here.
        usable = max(0, min((len(tokens) - 1) // size, wanted - 1))
        found = engine.pool.match(tokens, hashes[:usable])[:usable]
        engine.pool.acquire(found)
        self.table = list(found)
        self.num_acquired = len(found)

    def _free(self) -> None:
        pool = self._host.engine.pool
        pool.release(self.table)
        self.table, self.num_acquired = [], 0
        self._host.engine.wake()

    # ---- the sequence

    def _compute(self, handover: m.Handover) -> None:
        """Run the sequence, silently until the home has granted the claim."""
        assert self._handover is not None
        engine = self._host.engine
        request = self._request
        sequence = Sequence.start(
            request,
            epoch=handover.epoch,
            emitted=handover.output,
            eos_token_ids=engine.model.eos_token_ids,
        )
        sequence.acked = sequence.logprobs_from = handover.acked
        sequence.logprobs = list(handover.logprobs)
        wire_handover = self._handover
        if wire_handover.HasField("cached_tokens"):
            sequence.num_cached = wire_handover.cached_tokens
        wire.take_charged(sequence, wire_handover.charged)
        sequence.silent = self.machine.silent
        if handover.num_computed:
            engine.pool.commit(self.table[self.num_acquired :])
            sequence.block_table = list(self.table)
            sequence.num_computed = sequence.num_written = handover.num_computed
        else:
            # Nothing was computed before it left: it queues, and comes by blocks in its turn.
            engine.pool.release(self.table)
            self.table, self.num_acquired = [], 0
        self.sequence = sequence
        try:
            if handover.num_computed:
                engine.insert(sequence)
            else:
                engine.submit(sequence)
        except ValueError as error:
            # The source ran it under the same limits, so this is a fault in one of the two:
            # the client must hear of it once the request is ours.
            logger.error("cannot run %s, which was handed over: %s", request.request_id, error)
            self._error = str(error)
            sequence.finish_reason = FinishReason.ERROR
            engine.pool.release(sequence.block_table)
            sequence.block_table = []

    def _activate(self, epoch: int, next_index: int) -> None:
        sequence = self.sequence
        assert sequence is not None
        sequence.epoch = epoch
        self._host.engine.scheduler.grant(sequence)
        sequence.acknowledge(min(next_index, sequence.num_output))
        self._host.note_epoch(sequence.request_id, epoch)
        self._host.resend(sequence, next_index, self._error)
