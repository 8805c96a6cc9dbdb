"""The dispatcher of a simulation: the real policy, its actions carried out on the clock."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping
from typing import Protocol

from cluster.dispatcher.core import Dispatcher, DispatcherConfig
from cluster.dispatcher.events import (
    Action,
    AskPrefixes,
    Event,
    FetchLedger,
    Finished,
    Joined,
    LedgerCopied,
    Left,
    MigrationEnded,
    Place,
    PlaceRequested,
    Refuse,
    RejectMigration,
    Reported,
    ScalingEnded,
    SendLedger,
    Served,
    SetDraining,
    SetRole,
    StartMigration,
    Tick,
)
from cluster.dispatcher.messages import Placement, PlaceRequest, Refusal
from cluster.dispatcher.placement import NamedPolicy
from cluster.dispatcher.scaling import START
from cluster.simulation.instance import SimulatedInstance
from cluster.simulation.network import NetworkConfig
from instance.clock import Clock
from instance.leases import LedgerUpdate
from instance.load import InstanceInfo, LoadReport, MigrationReport

TICK = 0.1
"""Seconds between ticks of the core, as in ``cluster.dispatcher.actor``."""


class Answering(Protocol):
    """The gateway, as the dispatcher answers it."""

    def placed(self, placement: Placement) -> None:
        """A request shall run there."""

    def refused(self, refusal: Refusal) -> None:
        """A request cannot run now."""


class Instances(Protocol):
    """The cluster's instances, as the dispatcher's shell finds and orders them."""

    def living(self, name: str) -> SimulatedInstance | None:
        """The instance of a name, if it lives."""

    def add(self, name: str, started: Callable[[str], None]) -> None:
        """Start an instance; ``started`` is told the outcome."""

    def remove(self, name: str, stopped: Callable[[str], None]) -> None:
        """Stop an instance; ``stopped`` is told the outcome."""


class Observer(Protocol):
    """Is shown every event that the policy takes, before and after."""

    def before(self, core: Dispatcher, event: Event, now: float) -> None:
        """The core is about to take an event."""

    def after(self, core: Dispatcher, event: Event, actions: list[Action], now: float) -> None:
        """These are the actions that it wants."""


class SimulatedDispatcher:
    """Serialises events into the core and carries out what it decides.

    Args:
        core: Settings of the policy.
        seed: Of the policies that draw.
        instances: Who lives, and who starts and stops.
        policies: Placement policies besides those of the registry, by name.
        observer: Is shown every decision; None for nobody.

    Attributes:
        core: The policy itself.
        gateway: Whom to answer; set before the first event.
        migrations: Every migration that ended, with the time.
        rejected: Moves that an operator asked for and that could not start.
    """

    gateway: Answering

    def __init__(
        self,
        config: DispatcherConfig,
        seed: int,
        clock: Clock,
        network: NetworkConfig,
        instances: Instances,
        policies: Mapping[str, NamedPolicy],
        observer: Observer | None = None,
    ) -> None:
        self.core = Dispatcher(config, random.Random(seed), policies=policies)
        self.migrations: list[tuple[float, MigrationReport]] = []
        self.rejected = 0
        self._clock = clock
        self._network = network
        self._instances = instances
        self._ordered: set[str] = set()
        self._observer = observer
        self._calls: dict[SimulatedInstance, dict[str, StartMigration]] = {}

    def start(self) -> None:
        """Begin to tick."""
        self._clock.call_later(TICK, self._tick)

    # ---- what the others say: each call takes its way

    def place(self, request: PlaceRequest) -> None:
        """A gateway asks for a place."""
        self._later(lambda: self.handle(PlaceRequested(request)))

    def finished(self, request_id: str, epoch: int) -> None:
        """A request has ended at its home."""
        self._later(lambda: self.handle(Finished(request_id, epoch)))

    def join(self, info: InstanceInfo) -> None:
        """An instance has started."""
        self._later(lambda: self.handle(Joined(info)))

    def report(self, info: InstanceInfo, report: LoadReport) -> None:
        """A load report; an instance that is not known here joins again."""

        def take() -> None:
            if not self.core.members.knows(report.instance_id, report.incarnation):
                self.handle(Joined(info))
            self.handle(Reported(report))

        self._later(take)

    def leave(self, instance: SimulatedInstance) -> None:
        """An instance stops in good order."""
        left = Left(instance.instance_id, instance.incarnation)
        self._later(lambda: self.handle(left))

    def gone(self, instance: SimulatedInstance) -> None:
        """Calls to an instance that has died fail; that it is dead, its silence tells."""
        for action in self._calls.pop(instance, {}).values():
            self._migrated(_failed(action))

    def served(self, event: Served) -> None:
        """A gateway lost its stream to an instance."""
        self._later(lambda: self.handle(event))

    def handle(self, event: Event) -> None:
        """Let the core take an event now."""
        now = self._clock.now()
        if self._observer is not None:
            self._observer.before(self.core, event, now)
        actions = self.core.handle(event, now)
        if self._observer is not None:
            self._observer.after(self.core, event, actions, now)
        for action in actions:
            self._execute(action)

    # ---- what the core wants

    def _execute(self, action: Action) -> None:
        match action:
            case Place(placement, _):
                self._later(lambda: self.gateway.placed(placement))
            case Refuse(refusal, _):
                self._later(lambda: self.gateway.refused(refusal))
            case StartMigration():
                self._later(lambda: self._migrate(action))
            case SetDraining(instance_id, on):
                self._tell(instance_id, lambda to: to.set_draining(on))
            case SetRole(instance_id, role):
                self._tell(instance_id, lambda to: to.set_role(role))
            case AskPrefixes(instance_id):
                self._tell(instance_id, SimulatedInstance.tell_prefixes)
            case SendLedger(instance_id, incarnation, update):
                self._later(lambda: self._send_ledger(instance_id, incarnation, update))
            case FetchLedger(instance_id):
                self._tell(instance_id, self._copy_ledger)
            case RejectMigration():
                self.rejected += 1

    def _migrate(self, action: StartMigration) -> None:
        source = self._instances.living(action.source)
        peer = self._instances.living(action.destination.instance_id)
        if source is None or peer is None or peer.incarnation != action.destination.incarnation:
            self._migrated(_failed(action))
            return
        calls = self._calls.setdefault(source, {})
        calls[action.request_id] = action

        def ended(report: MigrationReport) -> None:
            calls.pop(action.request_id, None)
            self._later(lambda: self._migrated(report))

        source.enter(lambda: source.migrate(action.request_id, peer, action.reason, ended))

    def _migrated(self, report: MigrationReport) -> None:
        self.migrations.append((self._clock.now(), report))
        self.handle(MigrationEnded(report))

    def _tell(self, name: str, call: Callable[[SimulatedInstance], None]) -> None:
        """Call an instance, if it still lives when the call arrives."""

        def arrive() -> None:
            instance = self._instances.living(name)
            if instance is not None:
                instance.enter(lambda: call(instance))

        self._later(arrive)

    def _send_ledger(self, name: str, incarnation: str, update: LedgerUpdate) -> None:
        instance = self._instances.living(name)
        if instance is not None:
            instance.take_ledger(incarnation, update)

    def _copy_ledger(self, instance: SimulatedInstance) -> None:
        """Runs at the instance."""
        copy = instance.counters.copy()
        copied = LedgerCopied(instance.instance_id, instance.incarnation, copy)
        self._later(lambda: self.handle(copied))

    def _tick(self) -> None:
        self.handle(Tick())
        for name, what in self.core.scaler.orders().items():
            if name not in self._ordered:
                self._ordered.add(name)
                order = self._instances.add if what == START else self._instances.remove
                order(name, functools.partial(self._scaled, name))
        self._clock.call_later(TICK, self._tick)

    def _scaled(self, name: str, outcome: str) -> None:
        self._ordered.discard(name)
        self.handle(ScalingEnded(name, outcome))

    def _later(self, call: Callable[[], None]) -> None:
        self._clock.call_later(self._network.actor, call)


def _failed(action: StartMigration) -> MigrationReport:
    """What the dispatcher makes of a call to an instance that is dead."""
    return MigrationReport(
        action.request_id,
        "",
        action.source,
        action.destination.instance_id,
        action.reason,
        "error: the instance is dead",
    )
