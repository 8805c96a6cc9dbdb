"""One run: a workload, a cluster, a policy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.dispatcher.core import DispatcherConfig
from cluster.simulation.answers import Answers
from cluster.simulation.device import DeviceMaker, vocabulary
from cluster.simulation.dispatcher import Observer, SimulatedDispatcher
from cluster.simulation.gateway import ClientConfig, SimulatedGateway
from cluster.simulation.instance import SimulatedInstance
from cluster.simulation.network import NetworkConfig
from cluster.simulation.records import InstanceRecord, RequestRecord
from cluster.simulation.workloads.records import WorkloadRequest
from instance.clock import VirtualClock
from instance.config import EngineConfig
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
        seed: Of contents and of policies that draw.
        network: Delays.
        deaths: Instances that die.
        jumps: Account for steps together where nothing but decoding can happen; the outcome
            is the same without.
    """

    devices: tuple[DeviceMaker, ...]
    engine: EngineConfig
    dispatcher: DispatcherConfig
    max_tokens: int = 4096
    seed: int = 0
    network: NetworkConfig = field(default_factory=NetworkConfig)
    deaths: tuple[Death, ...] = ()
    jumps: bool = True


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
    ) -> None:
        self.clock = VirtualClock()
        self.instances: dict[str, SimulatedInstance] = {}
        self._scenario = scenario
        self._records: dict[str, InstanceRecord] = {}
        self._steps = self._jumped = 0
        clock, network = self.clock, scenario.network
        first = scenario.devices[0](clock).executor.description
        vocab, end_token = vocabulary(first)
        self._answers = Answers(vocab, end_token, scenario.seed)
        self.dispatcher = SimulatedDispatcher(
            scenario.dispatcher, scenario.seed, clock, network, self._living, observer
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
            self._start(number, life=0)
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

    def _living(self, name: str) -> SimulatedInstance | None:
        instance = self.instances.get(name)
        return instance if instance is not None and instance.alive else None

    def _start(self, number: int, life: int) -> None:
        scenario, name = self._scenario, f"instance-{number}"
        device = scenario.devices[number](self.clock)
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
        )
        self.instances[name] = instance
        self.gateway.connect(instance)
        self.dispatcher.join(instance.info)
        instance.start()

    def _die(self, death: Death) -> None:
        instance = self.instances[f"instance-{death.instance}"]
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
            life = int(instance.incarnation.rpartition("/")[2]) + 1
            self.clock.call_later(death.back_after, lambda: self._start(death.instance, life))

    def _count(self, instance: SimulatedInstance) -> None:
        self._steps += instance.engine.steps
        self._jumped += instance.engine.jumped
