"""A model instance around the migration state machines: steps, streams to homes, migrations.

It executes the machines' actions as a real shell must, on KV whose content is tracked, so
that a block that was freed, reused or overwritten too early is noticed at the next token
drawn from it.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.gateway.home_actions import Held, Peer
from instance.config import MigrationConfig
from instance.migration import messages as m
from instance.migration.destination import DestinationMigration
from instance.migration.epochs import EpochRegistry, SubmitDecision
from instance.migration.source import SourceMigration
from instance.request import SequenceStatus
from tests.unit.migration_kv import BLOCK, Pool, Seq, Violation, draw

if TYPE_CHECKING:
    from tests.unit.migration_world import World

CHUNK = 5
MAX_SEQS = 4
HEARTBEAT = 1.0
CONFIG = MigrationConfig(
    tail_blocks=1,
    max_stages=4,
    max_concurrent=3,
    reply_timeout=1.0,
    lease=2.0,
    claim_interval=0.25,
    grace=4.0,
)


# ---- what travels between homes and instances


@dataclass(frozen=True, slots=True)
class Submit:
    request_id: str
    epoch: int
    incarnation: str
    seed: int
    prompt: tuple[int, ...]
    limit: int
    emitted: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    request_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Ack:
    frame: int


@dataclass(frozen=True, slots=True)
class Ask:
    request_id: str
    epoch: int
    index: int


@dataclass(frozen=True, slots=True)
class Welcome:
    peer: Peer


@dataclass(frozen=True, slots=True)
class Frame:
    number: int
    request_id: str
    epoch: int
    index: int
    tokens: tuple[int, ...]
    finished: bool


@dataclass(frozen=True, slots=True)
class Holdings:
    submits: int
    held: tuple[Held, ...]


@dataclass(frozen=True, slots=True)
class Lost:
    request_id: str
    epoch: int


@dataclass(slots=True)
class HomeLink:
    """The instance's side of the stream to one home."""

    stream: Any = None
    lost_at: float | None = None
    submits: int = 0
    frames: int = 0
    unacked: collections.deque[tuple[int, Seq, int, int]] = field(default_factory=collections.deque)


@dataclass(slots=True, eq=False)
class Outgoing:
    machine: SourceMigration
    seq: Seq
    destination: str


@dataclass(slots=True, eq=False)
class Incoming:
    machine: DestinationMigration
    source: str
    template: Seq
    table: list[int] = field(default_factory=list)
    cached: int = 0
    reserved_once: bool = False
    seq: Seq | None = None
    handed_output: int = 0


@dataclass(slots=True, eq=False)
class Row:
    seq: Seq
    version: int
    start: int
    count: int
    table: list[int]


class Instance:
    """One incarnation of a model instance."""

    def __init__(self, world: World, name: str, incarnation: int) -> None:
        self.world = world
        self.name = name
        self.peer = Peer(name, f"{name}.{incarnation}")
        self.alive = True
        self.stopped = False
        self.pool = Pool()
        self.seqs: dict[str, Seq] = {}
        self.ended: dict[str, Seq] = {}
        self.links: dict[str, HomeLink] = {}
        self.registry = EpochRegistry(CONFIG.grace)
        self.outgoing: dict[str, Outgoing] = {}
        self.incoming: dict[str, Incoming] = {}
        self.step: list[Row] | None = None
        self.boundary: list[Callable[[], None]] = []
        self.next_heartbeat = world.now + HEARTBEAT
        self.void: dict[str, tuple[int, float]] = {}

    @property
    def now(self) -> float:
        return self.world.now

    # ---- steps

    def at_boundary(self, call: Callable[[], None]) -> None:
        if self.step is None:
            call()
        else:
            self.boundary.append(call)

    def can_launch(self) -> bool:
        return self.step is None and any(self._runs(seq) for seq in self.seqs.values())

    @staticmethod
    def _runs(seq: Seq) -> bool:
        if seq.status is SequenceStatus.HANDOVER:
            return seq.silent_steps > 0
        return not seq.finished

    def launch(self) -> None:
        rows: list[Row] = []
        for seq in list(self.seqs.values()):
            if len(rows) == MAX_SEQS or not self._runs(seq):
                continue
            if seq.status is SequenceStatus.WAITING and not seq.table:
                self._use_prefix(seq)
            count = min(CHUNK, seq.num_tokens - seq.written)
            missing = -(-(seq.written + count) // BLOCK) - len(seq.table)
            if missing > 0:
                more = self.pool.allocate(missing)
                if more is None:
                    if seq.status is SequenceStatus.WAITING:
                        self._drop_kv(seq)
                    continue
                seq.table.extend(more)
            if seq.status is SequenceStatus.WAITING:
                seq.status = SequenceStatus.RUNNING
            if seq.silent_steps:
                seq.silent_steps -= 1
            rows.append(Row(seq, seq.version, seq.written, count, list(seq.table)))
        if rows:
            self.step = rows
        else:
            self._preempt_all_but_first()

    def _preempt_all_but_first(self) -> None:
        running = [seq for seq in self.seqs.values() if seq.status is SequenceStatus.RUNNING]
        for seq in running[1:]:
            self.preempt(seq)

    def _use_prefix(self, seq: Seq) -> None:
        blocks = self.pool.find_prefix(seq.all_tags())
        for block in blocks:
            self.pool.acquire(block)
        seq.table.extend(blocks)
        seq.written = len(blocks) * BLOCK

    def complete(self) -> None:
        rows, self.step = self.step, None
        assert rows is not None
        for row in rows:
            tags = row.seq.all_tags()
            for at in range(row.start, row.start + row.count):
                self.pool.content[row.table[at // BLOCK]][at % BLOCK] = tags[at]
        for row in rows:
            seq = row.seq
            if self.seqs.get(seq.request_id) is not seq or seq.version != row.version:
                continue
            seq.written = row.start + row.count
            if seq.written == seq.num_tokens:
                self._draw(seq)
        calls, self.boundary = self.boundary, []
        for call in calls:
            call()

    def _draw(self, seq: Seq) -> None:
        for at, tag in enumerate(seq.all_tags()):
            if self.pool.content[seq.table[at // BLOCK]][at % BLOCK] != tag:
                raise Violation(f"{seq.request_id} reads wrong KV at {at} on {self.name}")
        seq.output.append(draw(seq.seed, len(seq.output)))
        if seq.status is SequenceStatus.HANDOVER:
            return
        index = len(seq.output) - 1
        if len(seq.output) >= seq.limit:
            self._finish(seq)
        self.emit(seq, index)

    def _finish(self, seq: Seq) -> None:
        seq.finished = True
        self.forget(seq)
        self.ended[seq.request_id] = seq
        for out in list(self.outgoing.values()):
            if out.seq is seq:
                self.to_source(out, m.SequenceEnded())

    def preempt(self, seq: Seq) -> None:
        self._drop_kv(seq)
        seq.status = SequenceStatus.WAITING
        for out in list(self.outgoing.values()):
            if out.seq is seq:
                self.to_source(out, m.Preempted())

    def _drop_kv(self, seq: Seq) -> None:
        self.pool.release(seq.table)
        seq.table, seq.written = [], 0
        seq.version += 1

    def forget(self, seq: Seq) -> None:
        """Take a sequence out, if it is still here; its epoch stays as a tombstone."""
        if self.seqs.get(seq.request_id) is seq:
            del self.seqs[seq.request_id]
            self._drop_kv(seq)
            seq.status = SequenceStatus.FINISHED
            self.registry.note(seq.request_id, seq.epoch, self.now)
            self._note_void(seq.request_id, seq.epoch)

    # ---- homes

    def emit(self, seq: Seq, index: int) -> None:
        """Send output from ``index`` on."""
        self.world.check_emission(self.peer, seq, index)
        link = self.links.get(seq.home)
        if link is None or link.stream is None:
            return
        link.frames += 1
        tokens = tuple(seq.output[index:])
        frame = Frame(link.frames, seq.request_id, seq.epoch, index, tokens, seq.finished)
        link.unacked.append((link.frames, seq, index, len(seq.output)))
        link.stream.up.send(frame)

    def send_home(self, home: str, message: Any) -> None:
        link = self.links.get(home)
        if link is not None and link.stream is not None:
            link.stream.up.send(message)

    def open_stream(self, home: str, stream: Any) -> None:
        link = self.links.setdefault(home, HomeLink())
        link.stream, link.lost_at = stream, None
        link.submits = link.frames = 0
        link.unacked.clear()
        stream.up.send(Welcome(self.peer))
        stream.up.send(self.holdings(home))
        self.tell_machines(home, m.HomeConnected())

    def stream_lost(self, home: str) -> None:
        link = self.links[home]
        link.stream, link.lost_at = None, self.now

    def holdings(self, home: str) -> Holdings:
        held = [*self.seqs.values(), *self.ended.values()]
        return Holdings(
            self.links[home].submits,
            tuple(
                Held(seq.request_id, seq.epoch, seq.status.value, len(seq.output))
                for seq in held
                if seq.home == home
            ),
        )

    def from_home(self, home: str, message: Any) -> None:
        link = self.links[home]
        match message:
            case Submit():
                link.submits += 1
                self._submit(home, message)
            case Cancel():
                self.cancel(message.request_id, message.epoch)
            case Ack():
                while link.unacked and link.unacked[0][0] <= message.frame:
                    _, seq, start, end = link.unacked.popleft()
                    if start <= seq.acked:
                        self._acked(seq, end)
            case Ask():
                self._answer(home, message)
            case m.ClaimReply():
                for out in list(self.outgoing.values()):
                    if out.machine.attempt == message.attempt:
                        self.to_source(out, message)
                for incoming in list(self.incoming.values()):
                    if incoming.machine.attempt == message.attempt:
                        self.to_destination(incoming, message)

    def _acked(self, seq: Seq, end: int) -> None:
        seq.acked = max(seq.acked, end)
        if seq.finished and seq.acked >= len(seq.output):
            self.ended.pop(seq.request_id, None)

    def _submit(self, home: str, submit: Submit) -> None:
        decision = self.registry.decide(
            submit.request_id,
            submit.epoch,
            self._live_epoch(submit.request_id),
            submit.incarnation == self.peer.incarnation,
            self.now,
        )
        if decision is SubmitDecision.LOST:
            self.send_home(home, Lost(submit.request_id, submit.epoch))
        elif decision is SubmitDecision.START:
            void, since = self.void.get(submit.request_id, (0, 0.0))
            if submit.epoch <= void and self.now - since < CONFIG.grace - 0.01:
                raise Violation(f"{self.name} starts {submit.request_id}@{submit.epoch} again")
            self.cancel(submit.request_id, submit.epoch - 1)
            self.seqs[submit.request_id] = Seq(
                request_id=submit.request_id,
                home=home,
                seed=submit.seed,
                prompt=submit.prompt,
                limit=submit.limit,
                epoch=submit.epoch,
                output=list(submit.emitted),
                acked=len(submit.emitted),
            )

    def _live_epoch(self, request_id: str) -> int | None:
        seq = self.seqs.get(request_id)
        live = [seq.epoch] if seq is not None else []
        live += [
            incoming.machine.epoch
            for incoming in self.incoming.values()
            if incoming.machine.request_id == request_id and incoming.machine.live
        ]
        return max(live, default=None)

    def cancel(self, request_id: str, epoch: int) -> None:
        self.registry.note(request_id, epoch, self.now)
        self._note_void(request_id, epoch)
        for out in list(self.outgoing.values()):
            if out.machine.request_id == request_id:
                self.to_source(out, m.Cancelled(epoch))
        for incoming in list(self.incoming.values()):
            if incoming.machine.request_id == request_id:
                self.to_destination(incoming, m.Cancelled(epoch))
        seq = self.seqs.get(request_id)
        if seq is not None and seq.epoch <= epoch:
            self.forget(seq)
        ended = self.ended.get(request_id)
        if ended is not None and ended.epoch <= epoch:
            del self.ended[request_id]

    def _note_void(self, request_id: str, epoch: int) -> None:
        """Told apart from the registry, so that the two can be compared."""
        known = self.void.get(request_id, (0, 0.0))[0]
        self.void[request_id] = (max(known, epoch), self.now)

    def _answer(self, home: str, ask: Ask) -> None:
        seq = self.seqs.get(ask.request_id) or self.ended.get(ask.request_id)
        if seq is None or seq.epoch != ask.epoch:
            self.send_home(home, Lost(ask.request_id, ask.epoch))
            return
        self._acked(seq, ask.index)
        if ask.index < len(seq.output) or seq.finished:
            self.emit(seq, ask.index)

    def tell_machines(self, home: str, event: m.HomeConnected | m.HomeGone) -> None:
        for out in list(self.outgoing.values()):
            if out.machine.home == home:
                self.to_source(out, event)
        for incoming in list(self.incoming.values()):
            if incoming.machine.home == home:
                self.to_destination(incoming, event)

    # ---- time

    def timers(self) -> list[float]:
        machines = [*self.outgoing.values(), *self.incoming.values()]
        deadlines = [entry.machine.deadline() for entry in machines]
        return [self.next_heartbeat, *(due for due in deadlines if due is not None)]

    def tick(self) -> None:
        for out in list(self.outgoing.values()):
            due = out.machine.deadline()
            if due is not None and due <= self.now:
                self.to_source(out, m.Tick())
        for attempt, incoming in list(self.incoming.items()):
            due, forget_at = incoming.machine.deadline(), incoming.machine.forget_at
            if due is not None and due <= self.now:
                self.to_destination(incoming, m.Tick())
            elif forget_at is not None and forget_at <= self.now:
                del self.incoming[attempt]
        if self.now >= self.next_heartbeat:
            self.next_heartbeat = self.now + HEARTBEAT
            self.registry.expire(self.now)
            for home, link in list(self.links.items()):
                if link.stream is not None:
                    link.stream.up.send(self.holdings(home))
                elif link.lost_at is not None and self.now - link.lost_at > CONFIG.grace:
                    self._bury(home)

    def _bury(self, home: str) -> None:
        self.tell_machines(home, m.HomeGone())
        for seq in [*self.seqs.values(), *self.ended.values()]:
            if seq.home == home:
                self.cancel(seq.request_id, seq.epoch)
        del self.links[home]

    # ---- migration out

    def can_migrate(self, seq: Seq) -> bool:
        return seq.status is not SequenceStatus.HANDOVER and not any(
            out.seq is seq for out in self.outgoing.values()
        )

    def migrate(self, seq: Seq, destination: str, attempt: str) -> None:
        machine = self.world.parts.source(attempt, seq.request_id, seq.epoch, seq.home, CONFIG)
        out = self.outgoing[attempt] = Outgoing(machine, seq, destination)
        has_kv = bool(seq.table)
        actions = machine.start(seq.written // BLOCK, len(seq.table), has_kv, self.now)
        self._source_actions(out, actions)

    def to_source(self, out: Outgoing, event: m.SourceEvent) -> None:
        self._source_actions(out, out.machine.handle(event, self.now))

    def _source_actions(self, out: Outgoing, actions: list[m.SourceAction]) -> None:
        seq, machine = out.seq, out.machine
        for action in actions:
            match action:
                case m.ToPeer(message):
                    if isinstance(message, m.Handover):
                        self.world.handed_over(self.peer, seq)
                    self.world.send_control(self, out.destination, message, seq)
                case m.ToHome(claim):
                    self.send_home(machine.home, claim)
                case m.CopyBlocks(stage, first, count):
                    blocks = seq.table[first : first + count]
                    if len(blocks) != count:
                        raise Violation("a copy reaches beyond the block table")
                    self.pool.pin(blocks)
                    self.world.start_copy(self, out, stage, first, blocks)
                case m.Detach():
                    self.at_boundary(lambda: self._detach(out))
                case m.Resume(epoch, next_index):
                    self._resume(seq, epoch, next_index)
                case m.FreeSequence():
                    self.world.check_free(self.peer, machine)
                    self.forget(seq)
                case m.Ended(outcome):
                    self.outgoing.pop(machine.attempt, None)
                    self.world.outcomes[outcome.partition(":")[0]] += 1

    def _detach(self, out: Outgoing) -> None:
        seq = out.seq
        if self.seqs.get(seq.request_id) is not seq or not self.alive:
            self.to_source(out, m.DetachFailed())
            return
        seq.status = SequenceStatus.HANDOVER
        spare = seq.table[-(-seq.written // BLOCK) :]
        del seq.table[len(seq.table) - len(spare) :]
        self.pool.release(spare)
        detached = m.Detached(len(seq.table), seq.written, tuple(seq.output), seq.acked)
        self.to_source(out, detached)

    def _resume(self, seq: Seq, epoch: int, next_index: int | None) -> None:
        if self.seqs.get(seq.request_id) is not seq:
            raise Violation("a sequence that is not here resumes")
        seq.status = SequenceStatus.RUNNING if seq.table else SequenceStatus.WAITING
        if next_index is not None:
            self._take_ownership(seq, epoch, next_index, len(seq.output))

    def _take_ownership(self, seq: Seq, epoch: int, next_index: int, claimed: int) -> None:
        if next_index != claimed:
            raise Violation(f"the home has {next_index} tokens of {claimed} after a claim")
        seq.epoch = epoch
        seq.acked = next_index
        seq.silent_steps = 0
        self.registry.note(seq.request_id, epoch, self.now)
        self.world.ownership_taken(self.peer, seq)
        if len(seq.output) >= seq.limit:
            self._finish(seq)
        if next_index < len(seq.output):
            self.emit(seq, next_index)

    def copy_done(self, out: Outgoing, stage: int, blocks: list[int], ok: bool) -> None:
        self.pool.unpin(blocks)
        seq = out.seq
        self.to_source(out, m.CopyDone(stage, ok, seq.written // BLOCK, len(seq.table)))

    # ---- migration in

    def from_source(self, source: str, message: Any, template: Seq) -> None:
        incoming = self.incoming.get(message.attempt)
        if incoming is not None:
            self.to_destination(incoming, message)
        elif isinstance(message, m.Offer):
            machine = self.world.parts.destination(message, CONFIG)
            incoming = self.incoming[message.attempt] = Incoming(machine, source, template)
            self._destination_actions(incoming, machine.start())
        elif isinstance(message, m.Handover):
            refusal = m.CancelMigration(message.attempt, "unknown attempt")
            self.world.answer_control(self, source, refusal)

    def to_destination(self, incoming: Incoming, event: m.DestinationEvent) -> None:
        self._destination_actions(incoming, incoming.machine.handle(event, self.now))

    def copy_started(self, attempt: str, stage: int) -> bool:
        """The first bytes of a stage are about to be written; false if they may not."""
        incoming = self.incoming.get(attempt)
        if incoming is None:
            return False
        actions = incoming.machine.handle(m.CopyStarted(stage), self.now)
        self._destination_actions(incoming, actions)
        return m.RejectCopy(stage) not in actions

    def _destination_actions(self, incoming: Incoming, actions: list[m.DestinationAction]) -> None:
        machine = incoming.machine
        for action in actions:
            match action:
                case m.Reserve(num_blocks):
                    self.at_boundary(lambda wanted=num_blocks: self._reserve(incoming, wanted))
                case m.ToPeer(message):
                    self.world.answer_control(self, incoming.source, message)
                case m.ToHome(claim):
                    self.send_home(machine.home, claim)
                case m.FreeReservation():
                    self._unreserve(incoming, incoming.table)
                    incoming.table = []
                case m.StartCompute(handover):
                    self._start_compute(incoming, handover)
                case m.Activate(epoch, next_index):
                    seq = incoming.seq
                    if seq is None or self.seqs.get(seq.request_id) is not seq:
                        raise Violation("a sequence that is not here is activated")
                    seq.status = SequenceStatus.RUNNING if seq.table else SequenceStatus.WAITING
                    self._take_ownership(seq, epoch, next_index, incoming.handed_output)
                case m.DropSequence():
                    assert incoming.seq is not None
                    self.forget(incoming.seq)
                case m.ExpectHandover() | m.RejectCopy() | m.Ended():
                    pass

    def _refusal(self, incoming: Incoming) -> str:
        machine = incoming.machine
        link = self.links.get(machine.home)
        others = [other for other in self.incoming.values() if other is not incoming]
        if self.world.refuses(machine.attempt):
            return "no room"
        if incoming.reserved_once:
            return ""
        if link is None or link.stream is None:
            return "no stream to the home"
        if not self.registry.accepts_offer(machine.request_id, machine.epoch):
            return "stale epoch"
        here = machine.request_id in self.seqs or any(
            other.machine.live and other.machine.request_id == machine.request_id
            for other in others
        )
        if here:
            return "already here"
        if sum(other.machine.live for other in others) >= CONFIG.max_concurrent:
            return "too many migrations"
        return ""

    def _reserve(self, incoming: Incoming, wanted: int) -> None:
        reason = self._refusal(incoming)
        cached: list[int] = []
        if not reason and not incoming.reserved_once:
            cached = self.pool.find_prefix(incoming.template.all_tags())[:wanted]
            for block in cached:
                self.pool.acquire(block)
        if not reason:
            more = self.pool.allocate(wanted - len(incoming.table) - len(cached))
            if more is None:
                self.pool.release(cached)
                reason = "no blocks"
            else:
                for block in more:
                    self.pool.reserved[block] = incoming.machine.attempt
                incoming.table += cached + more
                incoming.reserved_once = True
        self.to_destination(incoming, m.ReserveResult(not reason, len(cached), reason))

    def _unreserve(self, incoming: Incoming, blocks: list[int]) -> None:
        for block in blocks:
            if self.pool.reserved.get(block) == incoming.machine.attempt:
                del self.pool.reserved[block]
        self.pool.release(blocks)

    def _start_compute(self, incoming: Incoming, handover: m.Handover) -> None:
        template = incoming.template
        if handover.request_id in self.seqs:
            raise Violation("a second sequence of a request starts on one instance")
        table, spare = incoming.table[: handover.num_blocks], incoming.table[handover.num_blocks :]
        if len(table) < handover.num_blocks:
            raise Violation("a handover is taken without its reservation")
        for block in table:
            self.pool.reserved.pop(block, None)
        self._unreserve(incoming, spare)
        incoming.table = []
        incoming.handed_output = len(handover.output)
        incoming.seq = self.seqs[handover.request_id] = Seq(
            request_id=handover.request_id,
            home=incoming.machine.home,
            seed=template.seed,
            prompt=template.prompt,
            limit=template.limit,
            epoch=handover.epoch,
            output=list(handover.output),
            acked=handover.acked,
            status=SequenceStatus.HANDOVER,
            table=table,
            written=handover.num_computed,
            silent_steps=1,
        )
        self.registry.note(handover.request_id, handover.epoch, self.now)
