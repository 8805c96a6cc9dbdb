"""One run: a workload, a cluster, a policy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.dispatcher.core import DispatcherConfig
from cluster.dispatcher.placement import NamedPolicy
from cluster.dispatcher.scaling import instance_name
from cluster.simulation.answers import Answers
from cluster.simulation.device import DeviceMaker, vocabulary
from cluster.simulation.dispatcher import Observer, SimulatedDispatcher
from cluster.simulation.gateway import ClientConfig, SimulatedGateway
from cluster.simulation.instance import SimulatedInstance
from cluster.simulation.network import NetworkConfig
from cluster.simulation.records import InstanceRecord, RequestRecord
from cluster.simulation.scatter import Pace
from cluster.simulation.workloads.records import WorkloadRequest
from instance.clock import VirtualClock
from instance.config import EngineConfig
from instance.leases import LeasedCounters
from instance.load import InstanceInfo, LoadReport, MigrationReport
from instance.migration.messages import Claim
from instance.request import FinishReason
from instance.request import Sequence as LiveSequence


@dataclass(frozen=True, slots=True)
class Death:
    """An instance dies.

    Attributes:
        at: When, in seconds.
        instance: Its number.
        back_after: Seconds until it has started again; None: never.
    """

    at: float
    instance: int
    back_after: float | None = None


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything that a run depends on but its workload.

    Attributes:
        devices: One for each instance: makes its device for one life.
        engine: Settings of every instance.
        dispatcher: Settings of the policy.
        max_tokens: Output limit that every client states.
        seed: Of contents, of policies that draw, and of how steps scatter.
        network: Delays.
        deaths: Instances that die.
        start_seconds: What an instance that is added takes to start.
        policies: Placement policies besides those of the registry, by name.
        jumps: Account for steps together where nothing but decoding can happen; the outcome
            is the same without.
        counters: Makes the share of the ledger of an instance that starts.
    """

    devices: tuple[DeviceMaker, ...]
    engine: EngineConfig
    dispatcher: DispatcherConfig
    max_tokens: int = 4096
    seed: int = 0
    network: NetworkConfig = field(default_factory=NetworkConfig)
    deaths: tuple[Death, ...] = ()
    start_seconds: float = 60.0
    policies: Mapping[str, NamedPolicy] = field(default_factory=dict)
    jumps: bool = True
    counters: Callable[[], LeasedCounters] = LeasedCounters


@dataclass(frozen=True, slots=True)
class Outcome:
    """What happened.

    Attributes:
        requests: By arrival.
        instances: By name.
        migrations: Every migration that ended, with the time.
        seconds: Virtual time at the end.
        steps: Steps of all instances.
        jumped: How many of them were accounted for together with others.
        counters: The dispatcher's own.
        complete: Every request of the workload has ended.
    """

    requests: list[RequestRecord]
    instances: dict[str, InstanceRecord]
    migrations: list[tuple[float, MigrationReport]]
    seconds: float
    steps: int
    jumped: int
    counters: dict[str, dict[str, int]]
    complete: bool


class Simulation:
    """A cluster on a virtual clock.

    Args:
        scenario: What there is.
        workload: What is asked.
        observer: Is shown every decision; None for nobody.
        policies: As ``Scenario.policies``, for this run only.

    Attributes:
        clock: The one clock.
        gateway: The clients' side.
        dispatcher: The policy's side.
        instances: Present lives, by name.
    """

    def __init__(
        self,
        scenario: Scenario,
        workload: Sequence[WorkloadRequest],
        observer: Observer | None = None,
        policies: Mapping[str, NamedPolicy] | None = None,
    ) -> None:
        self.clock = VirtualClock()
        self.instances: dict[str, SimulatedInstance] = {}
        self._scenario = scenario
        self._records: dict[str, InstanceRecord] = {}
        self._lives: dict[str, int] = {}
        self._steps = self._jumped = 0
        clock, network = self.clock, scenario.network
        first = scenario.devices[0](clock).executor.description
        vocab, end_token = vocabulary(first)
        self._answers = Answers(vocab, end_token, scenario.seed)
        self.dispatcher = SimulatedDispatcher(
            scenario.dispatcher,
            scenario.seed,
            clock,
            network,
            self,
            {**scenario.policies, **(policies or {})},
            observer,
        )
        self.gateway = SimulatedGateway(
            clock,
            network,
            ClientConfig(
                max_tokens=scenario.max_tokens,
                max_model_len=min(scenario.engine.scheduler.max_model_len, first.max_model_len),
                vocab=vocab,
                seed=scenario.seed,
                block_size=first.block_size,
                salt=first.kv_salt if scenario.engine.scheduler.enable_prefix_caching else None,
            ),
            self._answers,
            self.dispatcher,
        )
        self.dispatcher.gateway = self.gateway
        for number in range(len(scenario.devices)):
            self._start(instance_name(number))
        self.dispatcher.start()
        for death in scenario.deaths:
            clock.call_later(death.at, functools.partial(self._die, death))
        self.gateway.load(workload)

    def run(self, progress: Callable[[float, int], bool] = lambda now, still_open: True) -> Outcome:
        """Run until every request has ended.

        Args:
            progress: Told now and then the time and how many requests are still to end;
                false stops the run.
        """
        clock, gateway = self.clock, self.gateway
        events = 0
        while gateway.open and clock.run_next():
            events += 1
            if events % 4096 == 0 and not progress(clock.now(), gateway.open):
                break
        for instance in self.instances.values():
            if instance.alive:
                instance.check()
                self._count(instance)
        return Outcome(
            requests=list(gateway.requests.values()),
            instances=self._records,
            migrations=self.dispatcher.migrations,
            seconds=clock.now(),
            steps=self._steps,
            jumped=self._jumped,
            counters={kind: dict(of) for kind, of in self.dispatcher.core.counters.items()},
            complete=not gateway.open,
        )

    # ---- surroundings of an instance

    def reported(self, instance: SimulatedInstance, report: LoadReport) -> None:
        """A load report is on its way to the dispatcher."""
        self.dispatcher.report(instance.info, report)

    def output(
        self, instance: SimulatedInstance, sequence: LiveSequence, reason: FinishReason
    ) -> None:
        """Output is on its way to the home."""
        self.gateway.output(instance, sequence, reason)

    def claim(self, instance: SimulatedInstance, claim: Claim) -> None:
        """A claim is on its way to the home."""
        self.gateway.claim(instance, claim)

    # ---- lives

    def living(self, name: str) -> SimulatedInstance | None:
        """The instance of a name, if it lives."""
        instance = self.instances.get(name)
        return instance if instance is not None and instance.alive else None

    def add(self, name: str, started: Callable[[str], None]) -> None:
        """Start an instance because the load asks for it; it takes the device of its number."""

        def ready() -> None:
            if self.living(name) is None:
                self._start(name)
            started("started")

        self.clock.call_later(self._scenario.start_seconds, ready)

    def remove(self, name: str, stopped: Callable[[str], None]) -> None:
        """Stop an instance that has been emptied."""
        instance = self.living(name)
        if instance is not None:
            instance.die()
            self._count(instance)
            self.dispatcher.leave(instance)
        stopped("stopped")

    def _start(self, name: str) -> None:
        scenario = self._scenario
        life = self._lives[name] = self._lives.get(name, -1) + 1
        number = int(name.rpartition("-")[2])
        device = scenario.devices[number % len(scenario.devices)](self.clock)
        pool = device.executor.num_blocks - 1
        record = self._records.setdefault(name, InstanceRecord(pool))
        instance = SimulatedInstance(
            InstanceInfo(
                instance_id=name,
                incarnation=f"{name}/{life}",
                address=name,
                node=name,
                model=device.executor.description,
                total_blocks=pool,
                max_num_seqs=scenario.engine.scheduler.max_num_seqs,
            ),
            device,
            scenario.engine,
            self.clock,
            scenario.network,
            self._answers,
            self,
            self.gateway.requests,
            record,
            jumps=scenario.jumps,
            counters=scenario.counters(),
            pace=Pace(device.scatter, scenario.seed, name) if device.scatter else None,
        )
        self.instances[name] = instance
        self.gateway.connect(instance)
        self.dispatcher.join(instance.info)
        instance.start()

    def _die(self, death: Death) -> None:
        instance = self.instances[instance_name(death.instance)]
        if not instance.alive:
            return
        instance.die()
        self._count(instance)

        def known() -> None:
            self.gateway.gone(instance)
            self.dispatcher.gone(instance)
            for other in self.instances.values():
                other.enter(functools.partial(other.attempts.peer_lost, instance))

        self.clock.call_later(self._scenario.network.detection, known)
        if death.back_after is not None:
            self.clock.call_later(
                death.back_after, functools.partial(self._start, instance.instance_id)
            )

    def _count(self, instance: SimulatedInstance) -> None:
        self._steps += instance.engine.steps
        self._jumped += instance.engine.jumped
