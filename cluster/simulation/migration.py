"""Live migration between simulated instances: the real protocol on a modelled link.

The state machines of ``instance.migration`` decide; here are their shells, which are to
``instance.migration.outgoing`` and ``incoming`` what a virtual clock is to a real one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from instance.clock import TimerHandle
from instance.config import MigrationConfig
from instance.kv.blocks import runs
from instance.kv.prefix import extend_hashes
from instance.load import MigrationReport
from instance.migration import messages as m
from instance.migration.destination import DestinationMigration
from instance.migration.source import CANCELLED, MOVED, SourceMigration
from instance.request import Sequence, SequenceStatus

if TYPE_CHECKING:
    from cluster.simulation.instance import SimulatedInstance


class Outgoing:
    """One attempt to move a sequence away; see ``instance.migration.outgoing``."""

    def __init__(
        self,
        host: SimulatedInstance,
        sequence: Sequence,
        peer: SimulatedInstance,
        name: str,
        reason: str,
        ended: Callable[[MigrationReport], None],
    ) -> None:
        self.sequence = sequence
        self.peer = peer
        self.machine = SourceMigration(
            name,
            sequence.request_id,
            sequence.epoch,
            sequence.request.home,
            host.config.migration,
        )
        self._host = host
        self._reason = reason
        self._ended = ended
        self._resolved = False
        self._started = host.clock.now()
        self._timer: TimerHandle | None = None
        self._bytes = 0
        self._copies = 0

    def start(self) -> None:
        """Offer the sequence."""
        sequence = self.sequence
        has_kv = sequence.status is SequenceStatus.RUNNING or sequence.num_swapped > 0
        self._execute(self.machine.start(*self._blocks(), has_kv, self._host.clock.now()))

    def handle(self, event: m.SourceEvent) -> None:
        """Feed an event to the protocol and do what it says."""
        if self.machine.ended and isinstance(event, m.Released):
            self._resolve(MOVED)
            return
        self._execute(self.machine.handle(event, self._host.clock.now()))

    def _blocks(self) -> tuple[int, int]:
        size = self._host.engine.pool.block_size
        kept = self.sequence.num_kept
        return kept // size, -(-kept // size)

    def _execute(self, actions: list[m.SourceAction]) -> None:
        host = self._host
        for action in actions:
            match action:
                case m.ToPeer(message):
                    host.tell(self.peer, functools.partial(self._deliver, message))
                case m.ToHome(claim):
                    host.claim(claim)
                case m.CopyBlocks(stage, first, count):
                    self._copy(stage, first, count)
                case m.Detach():
                    host.engine.detach(self.sequence, self._detached)
                case m.Resume(epoch, next_index):
                    self.sequence.epoch = epoch
                    host.engine.put_back(self.sequence)
                    if next_index is not None:
                        host.resend(self.sequence, next_index)
                case m.FreeSequence():
                    host.engine.forget(self.sequence)
                case m.Ended(outcome):
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
            self._timer = self._host.later(
                max(0.0, due - self._host.clock.now()), lambda: self.handle(m.Tick())
            )

    def _deliver(self, message: object) -> None:
        """Runs at the destination."""
        attempts = self.peer.attempts
        if isinstance(message, m.Offer):
            attempts.offered(message, self.sequence, self._host)
        else:
            attempts.from_source(message, self._host)

    def _copy(self, stage: int, first: int, count: int) -> None:
        host = self._host
        place = host.engine.kv_of(self.sequence)
        blocks = place.table[first : first + count]
        place.pool.pin(blocks)
        size = len(blocks) * host.block_bytes
        copies = len(runs(blocks))
        paced = self.sequence.status is not SequenceStatus.HANDOVER
        now = host.clock.now()
        seconds = host.link.send(size, copies, paced, now) - now
        attempts, name = self.peer.attempts, self.machine.attempt
        began: list[bool] = []
        host.tell(self.peer, lambda: began.append(attempts.copy_started(name, stage)))

        def written() -> None:
            ok = began == [True]
            if ok:
                # A stream breaks with its sender, and what it carried is not whole.
                attempts.copy_ended(name, stage, host.alive)
            self.peer.tell(host, functools.partial(sent, ok))

        def sent(ok: bool) -> None:
            place.pool.unpin(blocks)
            if ok:
                self._bytes += size
                self._copies += copies
            host.engine.wake()
            self.handle(m.CopyDone(stage, ok, *self._blocks()))

        host.tell(self.peer, written, seconds, lost=functools.partial(sent, False))

    def _detached(self, taken_out: bool) -> None:
        if self.machine.ended:
            if taken_out:
                self._host.engine.forget(self.sequence)
            return
        if not taken_out:
            self.handle(m.DetachFailed())
            return
        sequence = self.sequence
        self._host.left(sequence)
        self.handle(
            m.Detached(
                total_blocks=self._blocks()[1],
                num_computed=sequence.num_kept,
                output=tuple(sequence.output),
                acked=sequence.acked,
                logprobs=(),
            )
        )

    def _finish(self, outcome: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self.machine.detached_at is None or outcome != CANCELLED:
            self._resolve(outcome)
            return
        # The destination's release may still come: it tells a move from an abort.
        self._timer = self._host.later(
            self._host.config.migration.reply_timeout, lambda: self._resolve(outcome)
        )

    def _resolve(self, outcome: str) -> None:
        if self._resolved:
            return
        self._resolved = True
        machine, now = self.machine, self._host.clock.now()
        detached = machine.detached_at
        self._ended(
            MigrationReport(
                request_id=machine.request_id,
                attempt=machine.attempt,
                source=self._host.instance_id,
                destination=self.peer.instance_id,
                reason=self._reason,
                outcome=outcome,
                stages=machine.stages,
                blocks=machine.blocks_sent,
                bytes_copied=self._bytes,
                copies=self._copies,
                duration=now - self._started,
                detached=0.0 if detached is None else now - detached,
            )
        )
        self._host.report_soon()


class Incoming:
    """One attempt of a source to hand a sequence over; see ``instance.migration.incoming``.

    Attributes:
        machine: The protocol's state.
        table: Pool blocks by index in the sequence's block table.
        sequence: What runs here; None before the handover.
    """

    def __init__(
        self,
        host: SimulatedInstance,
        offer: m.Offer,
        offered: Sequence,
        source: SimulatedInstance,
        config: MigrationConfig,
    ) -> None:
        self.machine = DestinationMigration(offer, config)
        self.source = source
        self.table: list[int] = []
        self.num_acquired = 0
        self.sequence: Sequence | None = None
        self.rejected: set[int] = set()
        self._host = host
        self._offered = offered
        self._tokens = list(offered.tokens)
        self._admitted = False
        self._timer: TimerHandle | None = None

    @property
    def held(self) -> list[int]:
        """References to blocks outside the scheduler's sequences."""
        counted = self.sequence is None and not self.machine.ended
        return self.table[: self.num_acquired] if counted else []

    def start(self) -> None:
        """Answer the offer at the next step boundary."""
        self._execute(self.machine.start())

    def handle(self, event: m.DestinationEvent) -> None:
        """Feed an event to the protocol and do what it says."""
        self._execute(self.machine.handle(event, self._host.clock.now()))

    def _execute(self, actions: list[m.DestinationAction]) -> None:
        host = self._host
        for action in actions:
            match action:
                case m.ToPeer(message):
                    host.tell(
                        self.source,
                        functools.partial(self.source.attempts.from_destination, message),
                    )
                case m.ToHome(claim):
                    host.claim(claim)
                case m.Reserve(num_blocks):
                    host.engine.when_blocks_are_safe(functools.partial(self._reserve, num_blocks))
                case m.FreeReservation():
                    self._free()
                case m.StartCompute(handover):
                    self._compute(handover)
                case m.Activate(epoch, next_index):
                    assert self.sequence is not None
                    self.sequence.epoch = epoch
                    host.engine.scheduler.grant(self.sequence)
                    self.sequence.acknowledge(min(next_index, self.sequence.num_output))
                    host.resend(self.sequence, next_index)
                case m.DropSequence():
                    if self.sequence is not None:
                        host.engine.forget(self.sequence)
                case m.RejectCopy(stage):
                    self.rejected.add(stage)
                case m.ExpectHandover():
                    pass  # the scheduler's patch gives a late arrival its row
                case m.Ended():
                    host.report_soon()
        self._schedule()

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self.machine.deadline()
        if due is not None:
            self._timer = self._host.later(
                max(0.0, due - self._host.clock.now()), lambda: self.handle(m.Tick())
            )

    def _reserve(self, wanted: int) -> None:
        host = self._host
        pool = host.engine.pool
        first = not self._admitted
        if first:
            refusal = host.attempts.refusal(self)
            if refusal:
                self.handle(m.ReserveResult(False, reason=refusal))
                return
            self._admitted = True
            if wanted:
                self._acquire_cached(wanted)
        missing = wanted - len(self.table)
        if missing > 0:
            spare = len(host.engine.scheduler.running)
            blocks = None
            if pool.num_free >= missing + spare:
                blocks = pool.reserve(missing, self.table[-1] if self.table else None)
            if blocks is None:
                if first:
                    self._free()  # the protocol knows of none yet
                self.handle(m.ReserveResult(False, reason="not enough free blocks"))
                return
            self.table.extend(blocks)
        self.handle(m.ReserveResult(True, self.num_acquired))

    def _acquire_cached(self, wanted: int) -> None:
        engine = self._host.engine
        if not engine.prefix_caching:
            return
        size = engine.pool.block_size
        hashes: list[bytes] = []
        extend_hashes(hashes, self._tokens, size, engine.salt)
        usable = max(0, min((len(self._tokens) - 1) // size, wanted - 1))
        found = engine.pool.match(self._tokens, hashes[:usable])[:usable]
        engine.pool.acquire(found)
        self.table = list(found)
        self.num_acquired = len(found)

    def _free(self) -> None:
        self._host.engine.pool.release(self.table)
        self.table, self.num_acquired = [], 0
        self._host.engine.wake()

    def _compute(self, handover: m.Handover) -> None:
        engine, offered = self._host.engine, self._offered
        sequence = Sequence.start(
            offered.request,
            epoch=handover.epoch,
            emitted=handover.output,
            eos_token_ids=engine.model.eos_token_ids,
        )
        sequence.acked = handover.acked
        sequence.num_cached = offered.num_cached
        sequence.charged_prompt = offered.charged_prompt
        sequence.charged_output = offered.charged_output
        sequence.silent = self.machine.silent
        self.sequence = sequence
        self._host.landed(sequence)
        if handover.num_computed:
            engine.pool.commit(self.table[self.num_acquired :])
            sequence.block_table = list(self.table)
            sequence.num_computed = sequence.num_written = handover.num_computed
            engine.insert(sequence)
        else:
            engine.pool.release(self.table)
            self.table, self.num_acquired = [], 0
            engine.submit(sequence)
