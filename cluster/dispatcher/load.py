"""Load of the instances: what they reported, plus what was charged since.

A placement is charged to its instance at once, so that the next one sees it (Llumnix reads
loads some 50 ms old and sends a burst to one instance). A charge ends when a report holds
the request, when the request ends, or when it grows too old to be believed.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from enum import StrEnum

from instance.load import InstanceInfo, LoadReport, SequenceLoad
from instance.request import RequestClass


class InstanceState(StrEnum):
    """What the dispatcher may ask of an instance.

    READY: takes requests.
    SUSPECT: its reports are late; takes requests only where no ready instance is left.
    DRAINING: takes none, and its requests move away.
    GONE: its reports ended long ago, or it left; it may come back.
    """

    READY = "ready"
    SUSPECT = "suspect"
    DRAINING = "draining"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class LoadConfig:
    """How long reports and charges are trusted.

    Attributes:
        report_interval: Seconds between an instance's reports at most.
        suspect_intervals: Missed intervals after which an instance is suspect.
        gone_after: Seconds without a report after which it is gone.
        forget_after: Seconds without a report after which it is forgotten.
        charge_lifetime: Seconds that a charge lasts which no report confirms.
        headroom_blocks: KV blocks kept free on an instance that runs interactive
            sequences (Llumnix, section 4.4.2: the memory above which the ideal decode speed
            is lost). 0 treats every class alike.
    """

    report_interval: float = 0.5
    suspect_intervals: float = 3.0
    gone_after: float = 10.0
    forget_after: float = 600.0
    charge_lifetime: float = 30.0
    headroom_blocks: int = 0


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


@dataclass(frozen=True, slots=True)
class LoadView:
    """One instance's load at one instant: what policies decide by.

    Attributes:
        free: KV blocks free or cached, less those promised to charges and transfers.
        headroom: KV blocks kept free for the interactive class.
        running: Sequences in the batch, and those charged or on their way, which will be.
        waiting: KV blocks wanted by each waiting sequence, in queue order.
        last_placed: Number of the last placement made here; 0 before the first.
    """

    info: InstanceInfo
    state: InstanceState
    total: int
    free: int
    headroom: int
    running: int
    waiting: tuple[int, ...]
    step_seconds: float
    last_placed: int = 0

    @property
    def instance_id(self) -> str:
        return self.info.instance_id

    @property
    def num_requests(self) -> int:
        """Sequences running, promised and waiting."""
        return self.running + len(self.waiting)

    def placement_freeness(self) -> float:
        """Freeness that a new request meets: every waiting sequence counts with its demand."""
        return self._freeness(self.free - sum(self.waiting), self.num_requests)

    def rebalancing_freeness(self) -> float:
        """Freeness by which instances are paired: of the waiting, only the first counts."""
        demand = self.waiting[0] if self.waiting else 0
        return self._freeness(self.free - demand, self.running + bool(self.waiting))

    def _freeness(self, free: int, batch: int) -> float:
        """(M - sum of virtual usage) / batch, as Llumnix (section 4.4.1) defines it.

        A draining instance holds an infinite request. Where demand exceeds memory the
        shortage is not divided: else the fuller of two overloaded instances would look
        the freer one, and adding a request would raise freeness.
        """
        if self.state in (InstanceState.DRAINING, InstanceState.GONE):
            return -math.inf
        slack = free - self.headroom
        return slack / max(1, batch) if slack > 0 else float(slack)


@dataclass(slots=True, eq=False)
class InstanceLoad:
    """What the dispatcher knows of one instance.

    Attributes:
        info: The instance as it joined.
        heard: When it joined or reported last.
        report: Its last report; None before the first.
        charges: By request id, oldest first.
        draining: An operator asked that it be emptied.
        left: It said that it leaves.
        last_placed: Number of the last placement made here.
        settled: When the last migration from or to it ended.
    """

    info: InstanceInfo
    heard: float
    report: LoadReport | None = None
    charges: dict[str, Charge] = field(default_factory=dict)
    draining: bool = False
    left: bool = False
    last_placed: int = 0
    settled: float = -math.inf

    def state(self, now: float, config: LoadConfig) -> InstanceState:
        silent = now - self.heard
        if self.left or silent > config.gone_after:
            return InstanceState.GONE
        if self.draining or (self.report is not None and self.report.draining):
            return InstanceState.DRAINING
        if silent > config.report_interval * config.suspect_intervals:
            return InstanceState.SUSPECT
        return InstanceState.READY

    @property
    def sequences(self) -> tuple[SequenceLoad, ...]:
        """The sequences of the last report."""
        return () if self.report is None else self.report.sequences

    def find(self, request_id: str) -> SequenceLoad | None:
        """The reported sequence of a request, if any."""
        return next((s for s in self.sequences if s.request_id == request_id), None)

    def accept(self, report: LoadReport, now: float) -> bool:
        """Take a report; false, and no change, if it is not newer than the last one."""
        if report.incarnation != self.info.incarnation:
            return False
        if self.report is not None and report.number <= self.report.number:
            return False
        self.report = report
        self.heard = now
        self.left = False
        for sequence in report.sequences:
            self.release(sequence.request_id, sequence.epoch)
        return True

    def charge(self, sequence: SequenceLoad, now: float) -> None:
        """Count a request that was sent here, unless the last report holds it already."""
        reported = self.find(sequence.request_id)
        if reported is None or reported.epoch < sequence.epoch:
            self.charges[sequence.request_id] = Charge(sequence, now)

    def release(self, request_id: str, epoch: int) -> None:
        """Forget the charge of a request under ``epoch`` or an older one."""
        charge = self.charges.get(request_id)
        if charge is not None and charge.sequence.epoch <= epoch:
            del self.charges[request_id]

    def expire(self, oldest: float) -> int:
        """Forget charges made before ``oldest``; returns how many."""
        late = [key for key, charge in self.charges.items() if charge.since < oldest]
        for key in late:
            del self.charges[key]
        return len(late)

    def view(
        self,
        now: float,
        config: LoadConfig,
        arriving: tuple[Transfer, ...] = (),
        leaving: tuple[Transfer, ...] = (),
    ) -> LoadView:
        """The load at ``now``, with the migrations under way counted as if they were done."""
        report = self.report
        total = self.info.total_blocks if report is None else report.total_blocks
        free = total if report is None else report.free_blocks
        charged = [charge.sequence for charge in self.charges.values()]
        free -= sum(sequence.blocks for sequence in charged)
        # What the instance has reserved for arrivals it has taken out of `free` itself.
        reserved = 0 if report is None else report.reserved_blocks
        free -= max(0, sum(transfer.sequence.blocks for transfer in arriving) - reserved)
        going = {transfer.sequence.request_id for transfer in leaving}
        running = [s for s in self.sequences if s.running]
        stay = [s for s in running if s.request_id not in going]
        free += sum(s.blocks for s in running if s.request_id in going)
        interactive = any(
            s.request_class == RequestClass.INTERACTIVE for s in itertools.chain(stay, charged)
        )
        return LoadView(
            info=self.info,
            state=self.state(now, config),
            total=total,
            free=free,
            headroom=config.headroom_blocks if interactive else 0,
            running=len(stay) + len(charged) + len(arriving),
            waiting=tuple(
                s.blocks for s in self.sequences if not s.running and s.request_id not in going
            ),
            step_seconds=0.0 if report is None else report.step_seconds,
            last_placed=self.last_placed,
        )
