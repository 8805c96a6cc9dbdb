"""One life of a simulated instance: what ``instance.server`` is, without the network."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from cluster.simulation.answers import Answers
from cluster.simulation.attempts import Attempts
from cluster.simulation.device import DeviceModel
from cluster.simulation.engine import SimulatedEngine
from cluster.simulation.network import NetworkConfig
from cluster.simulation.records import InstanceRecord, RequestRecord
from cluster.simulation.scatter import Pace
from instance.clock import TimerHandle, VirtualClock
from instance.config import EngineConfig
from instance.kv.prefix_events import PrefixEvents
from instance.leases import LeasedCounters, LedgerUpdate
from instance.load import (
    InstanceInfo,
    LoadReport,
    MigrationFigures,
    MigrationReport,
    Role,
    build_report,
)
from instance.migration import messages as m
from instance.request import FinishReason, Request, Sequence
from instance.scheduler import Emission

COALESCE = 0.03
"""Events within so many seconds share a load report, as in ``instance.server``."""


class Surroundings(Protocol):
    """What an instance says to the others; each call takes the time of its way."""

    def reported(self, instance: SimulatedInstance, report: LoadReport) -> None:
        """A load report for the dispatcher."""

    def output(self, instance: SimulatedInstance, sequence: Sequence, reason: FinishReason) -> None:
        """The home gets all output of a sequence that it has not had."""

    def claim(self, instance: SimulatedInstance, claim: m.Claim) -> None:
        """A claim for the home."""


class SimulatedInstance:
    """Scheduler, pool and migrations of one incarnation, driven by the clock.

    Calls from other parts come through ``enter`` or ``tell``, after which the scheduler
    stands where a stepping one would.

    Attributes:
        alive: False once it has died; nothing of it happens from then on.
        instance_id: Its name.
        incarnation: Of this life.
        engine: The step loop.
        attempts: Its migrations.
    """

    def __init__(
        self,
        info: InstanceInfo,
        device: DeviceModel,
        config: EngineConfig,
        clock: VirtualClock,
        network: NetworkConfig,
        answers: Answers,
        surroundings: Surroundings,
        requests: Mapping[str, RequestRecord],
        record: InstanceRecord,
        role: Role = Role.MIXED,
        jumps: bool = True,
        counters: LeasedCounters | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.info = info
        self.instance_id = info.instance_id
        self.incarnation = info.incarnation
        self.config = config
        self.clock = clock
        self.alive = True
        self.draining = False
        self.role = role
        self.link = device.link
        self.block_bytes = device.block_bytes
        self.counters = counters or LeasedCounters()
        self.engine = SimulatedEngine(
            device.executor,
            config,
            clock,
            device.cost,
            answers,
            self._step_ended,
            self._decoded,
            self._failed,
            self._preempted,
            self.counters,
            jumps,
            self._began,
            pace,
            # A step's end tells that nobody waits any more.
            awaited=lambda: self._emptied,
        )
        self.attempts = Attempts(self)
        self._prefixes = PrefixEvents()
        if self.engine.prefix_caching:
            self.engine.pool.prefix.watcher = self._prefixes
        self._network = network
        self._surroundings = surroundings
        self._requests = requests
        self._record = record
        self._steps_before = record.steps[-1] if record.steps else 0
        self._reports = 0
        self._reported_waiting = False
        self._last_report = clock.now()
        self._report_timer: TimerHandle | None = None
        self._report_due = 0.0

    # ---- time and messages

    def enter(self, call: Callable[[], None]) -> None:
        """Run a call from outside here, unless the instance is dead."""
        if self.alive:
            self.engine.interrupt()
            call()
            self.engine.resume()

    def later(self, delay: float, call: Callable[[], None]) -> TimerHandle:
        """Run a call here after ``delay`` seconds, if the instance still lives."""
        return self.clock.call_later(delay, lambda: self.enter(call))

    def tell(
        self,
        other: SimulatedInstance,
        call: Callable[[], None],
        delay: float = 0.0,
        lost: Callable[[], None] | None = None,
    ) -> None:
        """Run a call at another instance, ``delay`` seconds and a message's way later.

        If that one is dead by then, ``lost`` runs here once this one can know.
        """

        def arrive() -> None:
            if other.alive:
                other.enter(call)
            elif lost is not None:
                self.later(self._network.detection, lost)

        self.clock.call_later(delay + self.link.latency, arrive)

    def start(self) -> None:
        """Begin to report."""
        self._schedule_report(self.clock.now())

    def die(self) -> None:
        """Everything here is lost; what was sent before still arrives."""
        self.engine.catch_up()
        silent = self.attempts.silent()
        for sequence in self.engine.scheduler.sequences.values():
            if sequence not in silent:
                self._surroundings.output(self, sequence, FinishReason.NOT_FINISHED)
        self.alive = False
        self.engine.stop()
        if self._report_timer is not None:
            self._report_timer.cancel()

    # ---- requests

    def submit(
        self, request: Request, epoch: int, emitted: SequenceOf[int], charged_prompt: int
    ) -> None:
        """A home sends a request, with the output that it already has and what is paid."""
        sequence = Sequence.start(
            request,
            epoch=epoch,
            emitted=tuple(emitted),
            eos_token_ids=self.engine.model.eos_token_ids,
        )
        paid = len(request.prompt) if emitted else min(charged_prompt, len(request.prompt))
        sequence.charged_prompt = max(sequence.charged_prompt, paid)
        try:
            self.engine.submit(sequence)
        except ValueError as error:
            sequence.error = str(error)
            self._surroundings.output(self, sequence, FinishReason.ERROR)
        self.report_soon()

    def cancel(self, request_id: str, epoch: int) -> None:
        """A home voids an epoch of a request and all older ones."""
        self.attempts.cancelled(request_id, epoch)
        sequence = self.engine.scheduler.sequences.get(request_id)
        if sequence is not None and sequence.epoch <= epoch:
            self.engine.abort(request_id)
        self.report_soon()

    def resend(self, sequence: Sequence, index: int) -> None:
        """Output from ``index`` on is told now: it was drawn before the home had decided."""
        now = self.clock.now()
        times = array("d", [now] * (sequence.num_output - index))
        if times:
            self._drew(sequence, times)
        if sequence.finish_reason:
            self._ended(sequence, sequence.finish_reason)

    def claim(self, claim: m.Claim) -> None:
        """A party of a migration here asks the home for a request."""
        self._surroundings.claim(self, claim)

    def migrate(
        self,
        request_id: str,
        peer: SimulatedInstance,
        reason: str,
        ended: Callable[[MigrationReport], None],
    ) -> None:
        """Move a request held here; ``ended`` is told how that went."""
        self.attempts.start(request_id, peer, reason, ended)

    # ---- what the dispatcher wants

    def set_draining(self, on: bool) -> None:
        """Say in the reports whether this instance is draining."""
        self.draining = on
        self.report_soon()

    def set_role(self, role: Role) -> None:
        """Say in the reports what this instance is for."""
        self.role = role
        self.report_soon()

    def take_ledger(self, incarnation: str, update: LedgerUpdate) -> None:
        """Take over what is new in the cluster's ledger; one for an older start is ignored.

        It stops no stretch of steps, unless a lease ends in it: who goes before whom is read
        from the counters only where somebody waits. Sums of charges are the same if they are
        charged later; whether they use up a lease is not.
        """
        if not self.alive or incarnation != self.incarnation:
            return
        if self.counters.changes_leases(update):
            self.engine.catch_up()
            self.counters.take(update)
            self.engine.leases_changed()
        else:
            self.counters.take(update)

    def tell_prefixes(self) -> None:
        """Report from now on as if nobody knew what the prefix cache holds."""
        self._prefixes.restart(self.engine.pool.prefix.keys())
        self.report_soon()

    # ---- steps

    def _step_ended(self, emissions: list[Emission]) -> None:
        now = self.clock.now()
        silent = self.attempts.silent() if self.attempts.num_in else ()
        for emission in emissions:
            sequence = emission.sequence
            if sequence in silent:
                continue
            if emission.tokens:
                self._drew(sequence, array("d", [now] * len(emission.tokens)))
            if emission.finish_reason:
                self.attempts.tell_source(sequence, m.SequenceEnded())
                self._ended(sequence, emission.finish_reason)
        if self._emptied or self.counters.due:
            self.report_soon()

    @property
    def _emptied(self) -> bool:
        """Somebody waited at the last report, and nobody does now."""
        return self._reported_waiting and not self.engine.scheduler.waiting

    def _decoded(self, sequences: SequenceOf[Sequence], times: SequenceOf[float]) -> None:
        silent = self.attempts.silent() if self.attempts.num_in else ()
        at = array("d", times)
        for sequence in sequences:
            if sequence not in silent:
                self._drew(sequence, at)

    def _drew(self, sequence: Sequence, times: array[float]) -> None:
        record = self._requests[sequence.request.request_id]
        if record.instances[-1] != self.instance_id:
            record.arrived(self.instance_id, times[0], self.engine.step_seconds)
        record.times.extend(times)
        if record.preempted_at is not None:
            record.resumed()

    def _began(self, sequence: Sequence) -> None:
        record = self._requests[sequence.request_id]
        if math.isnan(record.started):
            record.started = self.clock.now()

    def left(self, sequence: Sequence) -> None:
        """A sequence has left the batch here, to run elsewhere."""
        record = self._requests[sequence.request_id]
        record.left_at, record.landed_at = self.clock.now(), None

    def landed(self, sequence: Sequence) -> None:
        """All of a sequence is here."""
        self._requests[sequence.request_id].landed_at = self.clock.now()

    def _ended(self, sequence: Sequence, reason: FinishReason) -> None:
        record = self._requests[sequence.request_id]
        record.cached = max(record.cached, sequence.num_cached)
        self._surroundings.output(self, sequence, reason)
        self.report_soon()

    def _preempted(self, sequence: Sequence) -> None:
        self._requests[sequence.request_id].preempted(
            self.clock.now(),
            self.engine.step_seconds,
            sequence.num_output + sequence.num_in_flight,
        )
        self.attempts.tell_source(sequence, m.Preempted())

    def _failed(self, error: BaseException) -> None:
        raise error

    # ---- reports

    def report_soon(self) -> None:
        """Something changed that the dispatcher should hear of."""
        self._schedule_report(max(self.clock.now(), self._last_report + COALESCE))

    def _schedule_report(self, due: float) -> None:
        if self._report_timer is not None:
            if self._report_due <= due:
                return
            self._report_timer.cancel()
        self._report_due = due
        self._report_timer = self.clock.call_later(max(0.0, due - self.clock.now()), self._report)

    def _report(self) -> None:
        self._report_timer = None
        now = self._last_report = self.clock.now()
        self.engine.catch_up()
        self.attempts.expire(now)
        report = self.load()
        self.engine.leases_changed()
        self._note(report, now)
        self._surroundings.reported(self, report)
        if self._prefixes.pending:
            self.report_soon()
        self._schedule_report(now + self.config.report_interval)

    def load(self) -> LoadReport:
        """The state of this instance now."""
        self._reports += 1
        self._reported_waiting = bool(self.engine.scheduler.waiting)
        attempts = self.attempts
        return build_report(
            self.engine.scheduler,
            MigrationFigures(
                involves=attempts.involved().__contains__,
                reserved_blocks=attempts.reserved_blocks,
                num_out=attempts.num_out,
                num_in=attempts.num_in,
            ),
            instance_id=self.instance_id,
            incarnation=self.incarnation,
            number=self._reports,
            step_seconds=self.engine.step_seconds,
            draining=self.draining,
            role=self.role,
            prefix=self._prefixes.take(),
        )

    def _note(self, report: LoadReport, now: float) -> None:
        scheduler, record = self.engine.scheduler, self._record
        waiting = scheduler.waiting
        record.times.append(now)
        record.used.append(report.total_blocks - report.free_blocks)
        record.running.append(len(scheduler.running))
        record.waiting.append(len(waiting))
        block_size = scheduler.pool.block_size
        record.wanted.append(-(-len(waiting[0].tokens) // block_size) if waiting else 0)
        record.steps.append(self._steps_before + self.engine.steps)

    def check(self) -> None:
        """Raises IntegrityError if sequences and pool do not agree."""
        self.engine.catch_up()
        self.engine.scheduler.check_integrity(self.attempts.held_blocks())
