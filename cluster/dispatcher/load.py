"""Load of the instances: what they reported, plus what was charged since.

A placement is charged to its instance at once, so that the next one sees it (Llumnix reads
loads some 50 ms old and sends a burst to one instance). A charge ends when a report holds
the request, when the request ends, or when it grows too old to be believed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from cluster.dispatcher.views import InstanceState, LoadView, Reported
from instance.load import InstanceInfo, LoadReport, Role, SequenceLoad
from instance.request import Account, RequestClass


@dataclass(frozen=True, slots=True)
class LoadConfig:
    """How long reports and charges are trusted.

    Attributes:
        report_interval: Seconds between an instance's reports at most.
        suspect_intervals: Missed intervals after which an instance is suspect.
        gone_after: Seconds without a report after which it is gone.
        forget_after: Seconds without a report after which it is forgotten.
        charge_lifetime: Seconds that a charge lasts which no report confirms.
        headroom_blocks: KV blocks that others leave free on an instance that runs interactive
            sequences, while they have room elsewhere (Llumnix, section 4.4.2: the memory above
            which the ideal decode speed is lost). 0 treats every class alike.
    """

    report_interval: float = 0.5
    suspect_intervals: float = 3.0
    gone_after: float = 10.0
    forget_after: float = 600.0
    charge_lifetime: float = 30.0
    headroom_blocks: int = 0

    @property
    def suspect_after(self) -> float:
        """Seconds without a report after which an instance is suspect."""
        return self.report_interval * self.suspect_intervals


@dataclass(frozen=True, slots=True)
class Charge:
    """A request sent to an instance and not yet seen in its reports.

    Attributes:
        sequence: The request as the instance would report it before it starts.
        since: When it was charged.
    """

    sequence: SequenceLoad
    since: float


@dataclass(frozen=True, slots=True)
class Transfer:
    """A migration that was started and has not ended.

    Attributes:
        sequence: The request as its source reported it.
        since: When it was started.
    """

    sequence: SequenceLoad
    source: str
    destination: str
    reason: str
    since: float


def blocks_for(num_tokens: int, block_size: int) -> int:
    """KV blocks that ``num_tokens`` tokens fill, at least 1."""
    return max(1, -(-num_tokens // block_size))


class Room(NamedTuple):
    """What a request finds at an instance.

    Attributes:
        slack: Tokens that it may have to run at once; negative where none would run.
        waiting: Requests that wait there, or will when they arrive.
        full_batch: All slots of the batch are taken: who waits, waits for one to end.
    """

    slack: int
    waiting: int
    full_batch: bool


class _Staying(NamedTuple):
    """Sums over the reported sequences that are not on their way elsewhere."""

    running: int = 0
    waiting: tuple[int, ...] = ()
    backlog: int = 0
    interactive: int = 0
    interactive_blocks: int = 0
    freed: int = 0

    def without(self, sequence: SequenceLoad) -> _Staying:
        """The sums once a running sequence has left."""
        interactive = sequence.request_class == RequestClass.INTERACTIVE
        return _Staying(
            self.running - 1,
            self.waiting,
            backlog=self.backlog - (sequence.uncomputed if sequence.uncomputed > 1 else 0),
            interactive=self.interactive - interactive,
            interactive_blocks=self.interactive_blocks - interactive * sequence.blocks,
            freed=self.freed + sequence.blocks,
        )


@dataclass(slots=True)
class _Charged:
    """Sums over the charges of an instance, kept up to date as they come and go."""

    blocks: int = 0
    tokens: int = 0
    interactive: int = 0
    interactive_blocks: int = 0

    def add(self, sequence: SequenceLoad, sign: int) -> None:
        self.blocks += sign * sequence.blocks
        self.tokens += sign * sequence.uncomputed
        if sequence.request_class == RequestClass.INTERACTIVE:
            self.interactive += sign
            self.interactive_blocks += sign * sequence.blocks


class Book:
    """What the loads of a cluster share.

    Attributes:
        changed: Loads whose view is no longer true; taken by who keeps views.
        charged: Where each request is charged.
        reported: Who reported each request last.
    """

    def __init__(self) -> None:
        self.changed: set[InstanceLoad] = set()
        self.charged: dict[str, set[InstanceLoad]] = {}
        self.reported: dict[str, InstanceLoad] = {}


class InstanceLoad:
    """What the dispatcher knows of one instance.

    Args:
        info: The instance as it joined.
        heard: When it joined or reported last.
        book: Shared with the cluster's other loads.

    Attributes:
        info: As given; replaced when the same incarnation joins again.
        heard: When it joined or reported last.
        report: Its last report; None before the first.
        charges: By request id, oldest first; change them by ``charge`` and ``release``.
        draining: Whether this dispatcher ordered that it be emptied; None where it ordered
            nothing, which leaves that to the reports. A report may be older than the order.
        leaving: It is emptied because the cluster scales in, and stopped afterwards.
        left: It said that it leaves.
        role: What an operator made it; None leaves that to its reports.
        last_placed: Number of the last placement made here.
        settled: When the last migration from or to it ended.

    Whoever sets an attribute calls ``touch``.
    """

    def __init__(self, info: InstanceInfo, heard: float, book: Book | None = None) -> None:
        self.info = info
        self.heard = heard
        self.report: LoadReport | None = None
        self.charges: dict[str, Charge] = {}
        self.draining: bool | None = None
        self.leaving = False
        self.left = False
        self.role: Role | None = None
        self.last_placed = 0
        self.settled = -math.inf
        self._book = book or Book()
        self._charged = _Charged()
        self._arriving: dict[str, SequenceLoad] = {}
        self._going: dict[str, SequenceLoad] = {}
        self._ended: set[str] = set()
        self._by_id: dict[str, SequenceLoad] = {}
        self._reported = Reported(info.total_blocks, 0, (), 0)
        self._staying: _Staying | None = None
        self._accounts: frozenset[Account] | None = None
        self._view: LoadView | None = None
        self._waiting: tuple[LoadView, tuple[Account, ...]] | None = None
        self.touch()

    def touch(self) -> None:
        """Something changed: the view is made anew when it is next asked for."""
        self._view = None
        self._book.changed.add(self)

    def state(self, now: float, config: LoadConfig) -> InstanceState:
        """What may be asked of it at ``now``."""
        silent = now - self.heard
        if self.left or silent > config.gone_after:
            return InstanceState.GONE
        if self.drains:
            return InstanceState.DRAINING
        if silent > config.suspect_after:
            return InstanceState.SUSPECT
        return InstanceState.READY

    @property
    def drains(self) -> bool:
        """It takes no requests, and those it has move away."""
        if self.draining is None:
            return self.leaving or (self.report is not None and self.report.draining)
        return self.leaving or self.draining

    @property
    def present_role(self) -> Role:
        """What it is for: what an operator made it, else what it reports."""
        return self.role or (Role.MIXED if self.report is None else self.report.role)

    @property
    def sequences(self) -> tuple[SequenceLoad, ...]:
        """The sequences of the last report."""
        return () if self.report is None else self.report.sequences

    def find(self, request_id: str) -> SequenceLoad | None:
        """The reported sequence of a request, if any."""
        return self._by_id.get(request_id)

    def accept(self, report: LoadReport, now: float) -> bool:
        """Take a report; false, and no change, if it is not newer than the last one."""
        if report.incarnation != self.info.incarnation:
            return False
        if self.report is not None and report.number <= self.report.number:
            return False
        self.report = report
        self.heard = now
        self.left = False
        self.touch()
        self._staying = self._accounts = None
        self._ended.clear()
        before, self._by_id = self._by_id, {s.request_id: s for s in report.sequences}
        for request_id in self.charges.keys() & self._by_id.keys():
            self.release(request_id, self._by_id[request_id].epoch)
        known = self._book.reported
        for request_id in before.keys() - self._by_id.keys():
            if known.get(request_id) is self:
                del known[request_id]
        for request_id in self._by_id.keys() - before.keys():
            known[request_id] = self
        waiting = tuple(s.blocks for s in report.sequences if not s.running)
        self._reported = Reported(
            report.free_blocks, len(report.sequences) - len(waiting), waiting, report.preempted
        )
        return True

    # ---- charges and transfers

    def charge(self, sequence: SequenceLoad, now: float) -> None:
        """Count a request that was sent here, unless the last report holds it already."""
        reported = self.find(sequence.request_id)
        if reported is None or reported.epoch < sequence.epoch:
            self._drop(sequence.request_id)
            self.charges[sequence.request_id] = Charge(sequence, now)
            self._book.charged.setdefault(sequence.request_id, set()).add(self)
            self._charged.add(sequence, 1)
            self.touch()

    def release(self, request_id: str, epoch: int) -> None:
        """Forget the charge of a request under ``epoch`` or an older one."""
        charge = self.charges.get(request_id)
        if charge is not None and charge.sequence.epoch <= epoch:
            self._drop(request_id)

    def ended(self, request_id: str, epoch: int) -> None:
        """A request is over at its home: until the next report it is as if it had left."""
        sequence = self._by_id.get(request_id)
        if sequence is None or sequence.epoch > epoch or not self.counts(request_id):
            return
        self._ended.add(request_id)
        staying, self._accounts = self._staying, None
        self._staying = None
        if staying is not None and sequence.running:
            self._staying = staying.without(sequence)
        self.touch()

    def counts(self, request_id: str) -> bool:
        """Whether a reported request is still there, and not on its way elsewhere."""
        return request_id not in self._going and request_id not in self._ended

    def expire(self, oldest: float) -> int:
        """Forget charges made before ``oldest``; returns how many."""
        late = [key for key, charge in self.charges.items() if charge.since < oldest]
        for key in late:
            self._drop(key)
        return len(late)

    def clear(self) -> None:
        """Forget all charges."""
        for request_id in list(self.charges):
            self._drop(request_id)

    def forget(self) -> None:
        """Let go of all that is shared; the instance is gone for good, or started anew."""
        self.clear()
        for request_id in self._by_id:
            if self._book.reported.get(request_id) is self:
                del self._book.reported[request_id]

    def _drop(self, request_id: str) -> None:
        charge = self.charges.pop(request_id, None)
        if charge is not None:
            where = self._book.charged[request_id]
            where.discard(self)
            if not where:
                del self._book.charged[request_id]
            self._charged.add(charge.sequence, -1)
            self.touch()

    @property
    def moving(self) -> bool:
        """Whether a request is on its way here or from here."""
        return bool(self._arriving or self._going)

    def arrives(self, sequence: SequenceLoad, on: bool) -> None:
        """A request is on its way here, or no longer."""
        self._mark(self._arriving, sequence, on)

    def goes(self, sequence: SequenceLoad, on: bool) -> None:
        """A request is on its way from here, or no longer."""
        self._mark(self._going, sequence, on)

    def _mark(self, marked: dict[str, SequenceLoad], sequence: SequenceLoad, on: bool) -> None:
        if on:
            marked[sequence.request_id] = sequence
        else:
            marked.pop(sequence.request_id, None)
        self._staying = self._accounts = None
        self.touch()

    @property
    def expected(self) -> frozenset[Account]:
        """Whose requests were sent or move here and are not reported yet."""
        sent = [charge.sequence.account for charge in self.charges.values()]
        return frozenset(sent).union(one.account for one in self._arriving.values())

    # ---- room

    @property
    def running_accounts(self) -> frozenset[Account]:
        """Whose sequences run here and stay."""
        if self._accounts is None:
            self._accounts = frozenset(
                s.account
                for s in self.sequences
                if not s.waits and not s.migrating and self.counts(s.request_id)
            )
        return self._accounts

    def to_wait(self) -> list[SequenceLoad]:
        """What waits here, and what was sent and will have to."""
        there = [s for s in self.sequences if not s.running and self.counts(s.request_id)]
        return there + self._late_charges()

    @property
    def waiting_accounts(self) -> tuple[Account, ...]:
        """Of each of ``to_wait`` its account."""
        view = self._view
        if view is None:  # nobody knows yet what will have to wait
            return tuple(one.account for one in self.to_wait())
        if self._waiting is None or self._waiting[0] is not view:
            self._waiting = view, tuple(one.account for one in self.to_wait())
        return self._waiting[1]

    def room(self, view: LoadView) -> Room:
        """What a request finds here. The headroom is taken off."""
        waiting = len(view.waiting) + len(self._late_charges())
        full = view.running >= self.info.max_num_seqs
        # An instance admits only if a block stays free for each running sequence.
        free = -1 if waiting or full else view.free - view.running
        return Room((free - view.headroom) * self.info.model.block_size, waiting, full)

    def _late_charges(self) -> list[SequenceLoad]:
        """Of what was sent here, the last ones, for which there is no room."""
        view, most = self._view, self.info.max_num_seqs
        if view is None or view.waiting:
            return [charge.sequence for charge in self.charges.values()]
        free, running, late = view.free, view.running, []
        for charge in reversed(self.charges.values()):
            if free >= running - 1 and running <= most:
                break
            late.append(charge.sequence)
            free += charge.sequence.blocks
            running -= 1
        late.reverse()
        return late

    # ---- views

    def view(self, now: float, config: LoadConfig) -> LoadView:
        """The load at ``now``, with the migrations under way counted as if they were done."""
        state = self.state(now, config)
        if self._view is None or self._view.state is not state:
            self._view = self._make_view(state, config)
        return self._view

    def _make_view(self, state: InstanceState, config: LoadConfig) -> LoadView:
        report, charged = self.report, self._charged
        total = self.info.total_blocks if report is None else report.total_blocks
        free = total if report is None else report.free_blocks
        staying = self._staying or self._sum_staying()
        free += staying.freed - charged.blocks
        arriving: list[SequenceLoad] = []
        urgent: list[int] = []
        if self._arriving:
            # What the instance has reserved for arrivals it has taken out of `free` itself.
            reserved = 0 if report is None else report.reserved_blocks
            arriving = [s for s in self._arriving.values() if s.request_id not in self._by_id]
            free -= max(0, sum(s.blocks for s in arriving) - reserved)
            urgent = [s.blocks for s in arriving if s.request_class == RequestClass.INTERACTIVE]
        return LoadView(
            info=self.info,
            state=state,
            total=total,
            free=free,
            reserve=config.headroom_blocks,
            running=staying.running + len(self.charges) + len(arriving),
            waiting=staying.waiting,
            step_seconds=0.0 if report is None else report.step_seconds,
            interactive=charged.interactive + staying.interactive + len(urgent),
            interactive_blocks=charged.interactive_blocks
            + staying.interactive_blocks
            + sum(urgent),
            last_placed=self.last_placed,
            role=self.present_role,
            charged=len(self.charges),
            backlog=charged.tokens + staying.backlog,
            costs=None if report is None else report.costs,
            reported=self._reported,
        )

    def _sum_staying(self) -> _Staying:
        running = backlog = interactive = blocks = freed = 0
        waiting = []
        for sequence in self.sequences:
            if not self.counts(sequence.request_id):
                freed += sequence.blocks if sequence.running else 0
            elif sequence.running:
                running += 1
                if sequence.request_class == RequestClass.INTERACTIVE:
                    interactive += 1
                    blocks += sequence.blocks
                backlog += sequence.uncomputed if sequence.uncomputed > 1 else 0
            else:
                waiting.append(sequence.blocks)
                backlog += sequence.uncomputed
        self._staying = _Staying(running, tuple(waiting), backlog, interactive, blocks, freed)
        return self._staying
