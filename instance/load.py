"""What an instance reports of its load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from instance.budget import StepCosts
from instance.executor import ModelDescription
from instance.fairness import service
from instance.kv.prefix_events import PrefixDelta, merge
from instance.leases import LeasedCounters, ServiceReport
from instance.request import Account, RequestClass, Sequence, SequenceStatus
from instance.scheduler import Scheduler


class Role(StrEnum):
    """What an instance is for: everything, prompts only, or what comes after the prompt."""

    MIXED = "mixed"
    PREFILL = "prefill"
    DECODE = "decode"


_WAITING = SequenceStatus.WAITING
_MEASURED_AFTER = 8
"""Steps with prefill after which their costs are reported."""


class Figure(NamedTuple):
    """A value of a declared series of ``/metrics``.

    Attributes:
        value: Of a counter, the count since the start; of a histogram, the observations' sum.
        labels: Values of the series' own labels, in the order of their declaration.
        buckets: Of a histogram, observations by bucket, those above the last bound included.
    """

    name: str
    value: float
    labels: tuple[str, ...] = ()
    buckets: tuple[int, ...] = ()


class SequenceLoad(NamedTuple):
    """One sequence as the dispatcher needs to see it.

    Attributes:
        blocks: KV blocks held (running) or wanted for the prompt (waiting).
        num_tokens: Tokens known.
        migrating: Takes part in a migration already.
        paused: In the batch, but its prefill stands still for a tenant further behind.
        uncomputed: Known tokens whose KV is not there yet; 1 for one that decodes.
    """

    request_id: str
    epoch: int
    tenant: str
    request_class: RequestClass
    home: str
    running: bool
    blocks: int
    num_tokens: int
    migrating: bool = False
    uncomputed: int = 0
    paused: bool = False

    @property
    def account(self) -> Account:
        """Who is charged."""
        return self.tenant, self.request_class

    @property
    def waits(self) -> bool:
        """Whether it counts as waiting, for fairness: queued, swapped out or paused."""
        return not self.running or self.paused


@dataclass(frozen=True, slots=True)
class LoadReport:
    """State of an instance at one instant.

    Attributes:
        instance_id: Name of the instance.
        incarnation: Changes each time the instance starts.
        number: Increases with every report of an incarnation.
        total_blocks: Usable KV blocks.
        free_blocks: Blocks free or cached.
        reserved_blocks: Blocks reserved for incoming migrations.
        step_seconds: Median duration of recent steps; 0 before the first.
        sequences: Running first, then waiting in queue order.
        figures: For ``/metrics``.
        service: What was charged to tenants; None where no ledger is kept.
        costs: What its steps cost, as it learned; None before it has.
        preempted: Waiting sequences that were in the batch before.
        role: What the instance is for at present.
        prefix: What changed in its prefix cache since the report before.
    """

    instance_id: str
    incarnation: str
    number: int
    total_blocks: int
    free_blocks: int
    reserved_blocks: int
    step_seconds: float
    sequences: tuple[SequenceLoad, ...]
    migrations_out: int = 0
    migrations_in: int = 0
    draining: bool = False
    figures: tuple[Figure, ...] = ()
    costs: StepCosts | None = None
    preempted: int = 0
    role: Role = Role.MIXED
    service: ServiceReport | None = None
    prefix: PrefixDelta | None = None

    def after(self, unsent: LoadReport | None) -> LoadReport:
        """This report, with what an older one would have told that is not sent any more."""
        if unsent is None or unsent.incarnation != self.incarnation:
            return self
        own = self.service
        if own is not None and unsent.service is not None and unsent.service.leased:
            own = replace(own, leased=True)
        return replace(self, prefix=merge(unsent.prefix, self.prefix), service=own)


@dataclass(frozen=True, slots=True)
class InstanceInfo:
    """How to reach a started instance, and what it is.

    Attributes:
        address: "host:port" of its gRPC server.
        node: Name of the machine it runs on.
        pid: Its process on that machine.
    """

    instance_id: str
    incarnation: str
    address: str
    node: str
    model: ModelDescription
    total_blocks: int
    max_num_seqs: int
    pid: int = 0


@dataclass(frozen=True, slots=True)
class MigrationReport:
    """How one migration attempt ended, as its source saw it.

    Attributes:
        outcome: "moved", or the named reason why the request stayed.
        stages: Copy stages, the tail included.
        bytes_copied: KV bytes sent.
        copies: Contiguous runs sent.
        duration: Seconds from the offer to the release.
        detached: Seconds from the step boundary at which the request left the source's
            batch to the release.
    """

    request_id: str
    attempt: str
    source: str
    destination: str
    reason: str
    outcome: str
    stages: int = 0
    blocks: int = 0
    bytes_copied: int = 0
    copies: int = 0
    duration: float = 0.0
    detached: float = 0.0


@dataclass(frozen=True, slots=True)
class MigrationFigures:
    """What the migrations of an instance add to its report.

    Attributes:
        involves: Whether a request takes part in an attempt here.
        reserved_blocks: Blocks reserved for incoming attempts.
        num_out: Attempts as source.
        num_in: Attempts as destination.
    """

    involves: Callable[[str], bool]
    reserved_blocks: int
    num_out: int
    num_in: int


def build_report(
    scheduler: Scheduler,
    migrations: MigrationFigures,
    *,
    instance_id: str,
    incarnation: str,
    number: int,
    step_seconds: float,
    draining: bool,
    figures: tuple[Figure, ...] = (),
    role: Role = Role.MIXED,
    prefix: PrefixDelta | None = None,
) -> LoadReport:
    """The state of an instance now; the server and the simulator report with it.

    Where the scheduler's counters are leased, this is the report that renews the leases.
    """
    block_size, involves = scheduler.pool.block_size, migrations.involves

    def view(sequence: Sequence, running: bool) -> SequenceLoad:
        request, num_tokens = sequence.request, len(sequence.tokens)
        return SequenceLoad(
            request.request_id,
            sequence.epoch,
            request.tenant,
            request.request_class,
            request.home,
            running,
            blocks=len(sequence.block_table) if running else -(-num_tokens // block_size),
            num_tokens=num_tokens,
            migrating=involves(request.request_id),
            uncomputed=max(0, num_tokens - sequence.num_written),
            paused=running and scheduler.is_paused(sequence),
        )

    waiting = [view(sequence, False) for sequence in scheduler.waiting]
    held = [
        view(sequence, True)
        for sequence in scheduler.sequences.values()
        if sequence.status is not _WAITING
    ]
    return LoadReport(
        instance_id=instance_id,
        incarnation=incarnation,
        number=number,
        total_blocks=scheduler.pool.num_usable,
        free_blocks=scheduler.pool.num_free,
        reserved_blocks=migrations.reserved_blocks,
        step_seconds=step_seconds,
        sequences=(*held, *waiting),
        migrations_out=migrations.num_out,
        migrations_in=migrations.num_in,
        draining=draining,
        figures=figures,
        costs=_costs(scheduler),
        preempted=sum(1 for sequence in scheduler.waiting if sequence.num_preemptions),
        role=role,
        service=_service(scheduler),
        prefix=prefix,
    )


def _costs(scheduler: Scheduler) -> StepCosts | None:
    learner = scheduler.budget.learner
    return learner.costs if learner.prefill_samples >= _MEASURED_AFTER else None


def _service(scheduler: Scheduler) -> ServiceReport | None:
    counters = scheduler.counters
    if not isinstance(counters, LeasedCounters):
        return None
    config = scheduler.config
    step = service(config.max_num_batched_tokens, scheduler.max_num_seqs)
    # A reading is used for so many steps, while one step runs and the next one is planned.
    return counters.report(scheduler.priorities.theta, (config.priority_interval + 2) * step)
