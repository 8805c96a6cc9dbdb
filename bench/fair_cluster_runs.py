"""One run of one system of ``bench.cluster_fairness``: a simulated cluster that is watched.

Dispatcher, schedulers and migrations are the real ones, on a virtual clock:

drover
    The cluster as it is served.
fcfs
    Placed on arrival, and served in the order of arrival on each instance.
vtc per instance
    Placed on arrival; each instance keeps counters of what it serves itself.
ledger, no moves
    Placed on arrival; the instances share the ledger, but no request moves.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.service_record import ServiceRecord
from cluster.dispatcher.candidates import Candidates
from cluster.dispatcher.core import DispatcherConfig
from cluster.dispatcher.events import MigrationRequested
from cluster.dispatcher.fairness import Source
from cluster.dispatcher.messages import PlaceRequest
from cluster.dispatcher.placement import NamedPolicy, Uniform, freeness
from cluster.dispatcher.rebalance import RebalanceConfig
from cluster.dispatcher.requests import RequestConfig
from cluster.dispatcher.scaling import instance_name
from cluster.dispatcher.views import LoadView
from cluster.simulation.device import device
from cluster.simulation.profile import CostProfile
from cluster.simulation.simulation import Scenario, Simulation
from cluster.simulation.workloads.records import WorkloadRequest
from instance.config import EngineConfig, SchedulerConfig
from instance.leases import LeasedCounters, LedgerUpdate
from instance.request import Account, RequestClass

STANDARD = RequestClass.STANDARD
LOOK = 0.1
"""Seconds between two looks at the counters."""
PINNED = "pinned"


class BlindCounters(LeasedCounters):
    """Charges as it should, and tells the scheduler that all tenants are alike."""

    def counter(self, account: Account) -> float:
        return 0.0

    def weight(self, tenant: str) -> float:
        # So heavy that no service counts.
        return math.inf


class OwnCounters(LeasedCounters):
    """Knows nothing but what is charged on its own instance."""

    def take(self, update: LedgerUpdate) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class System:
    """A way of serving tenants on several instances.

    Attributes:
        name: Of the system.
        counters: What the instances order tenants by.
        moves: Requests wait in the dispatcher, and move for fairness.
    """

    name: str
    counters: type[LeasedCounters] = LeasedCounters
    moves: bool = False


DROVER = System("drover", moves=True)
FCFS = System("fcfs", BlindCounters)
OWN = System("vtc per instance", OwnCounters)
STILL = System("ledger, no moves")


@dataclass(frozen=True, slots=True)
class Setting:
    """What the systems have in common.

    Attributes:
        profile: Of every instance.
        theta: Of every scheduler; the leases follow from it.
        seconds: How long they serve.
        scheduler: Limits of every scheduler.
    """

    profile: CostProfile
    theta: float
    seconds: float
    scheduler: SchedulerConfig = dataclasses.field(default_factory=SchedulerConfig)


def pinning(tenant: str, late_binding: bool) -> NamedPolicy:
    """All requests of a tenant are placed on the first instance, whatever that has to do."""

    def choose(request: PlaceRequest, candidates: Candidates, rng: Uniform) -> LoadView:
        if request.tenant == tenant:
            return min(candidates, key=lambda view: view.instance_id)
        return freeness(request, candidates, rng)

    return NamedPolicy(choose, late_binding=late_binding)


class Watch:
    """Looks at a cluster's counters now and then.

    Args:
        simulation: What is watched.
        migrate: Chance that a request of an instance is moved elsewhere between two looks.
        rng: Draws these.

    Attributes:
        record: Service of every tenant; what a tenant has asked for is noted by the caller.
        gaps: By look: the time, how far apart the counters of the tenants that wait are, and
            what that may be (G); only where two of them wait.
    """

    def __init__(self, simulation: Simulation, migrate: float, rng: random.Random) -> None:
        self.record = ServiceRecord()
        self.gaps: list[tuple[float, float, float]] = []
        self._simulation = simulation
        self._migrate = migrate
        self._rng = rng
        self._known: dict[str, float] = {}
        self._later()

    def _later(self) -> None:
        self._simulation.clock.call_later(LOOK, self._look)

    def _look(self) -> None:
        simulation = self._simulation
        ledger = simulation.dispatcher.core.ledger
        for instance in simulation.instances.values():
            instance.engine.catch_up()
        waiting = ledger.waiting(STANDARD)
        counters = []
        now = simulation.clock.now()
        for account in ledger.accounts:
            charged = hidden = 0.0
            for instance in simulation.instances.values():
                here = instance.counters.charged(account)
                source = Source(instance.instance_id, instance.incarnation)
                charged += here
                hidden += here - ledger.applied(source, account)
            new = charged - self._known.get(account[0], 0.0)
            self._known[account[0]] = charged
            self.record.served_units(account[0], new, now)
            if account in waiting:
                counters.append(ledger.counter(account) + hidden)
        if len(counters) > 1:
            self.gaps.append((now, max(counters) - min(counters), ledger.bound(STANDARD)))
        self._move_some()
        self._later()

    def _move_some(self) -> None:
        """Ask, as an operator would, for moves of random requests to random instances."""
        dispatcher, rng = self._simulation.dispatcher, self._rng
        names = sorted(self._simulation.instances)
        for name in names if self._migrate and len(names) > 1 else ():
            if rng.random() < self._migrate:
                held = sorted(self._simulation.instances[name].engine.scheduler.sequences)
                if held:
                    other = rng.choice([one for one in names if one != name])
                    dispatcher.handle(MigrationRequested(rng.choice(held), other))


def run(
    system: System,
    setting: Setting,
    instances: int,
    workload: Sequence[WorkloadRequest],
    pinned: str = "",
    migrate: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Serve a workload for a time; what is not served by then stays so.

    Args:
        pinned: A tenant whose requests are all placed on the first instance, on arrival.
        migrate: Chance that an instance must give a random request away, by ``LOOK``.

    Returns:
        ``gap_max``, ``gap_mean``: of tenants that wait, and ``over_bound_max``,
        ``over_bound_mean``: the same over G; ``bound``: the least G.
        ``gaps``: by second, the largest gap in it and G at its end.
        ``window_max``, ``window_mean``: service difference per second in 60 s windows.
        ``received``: each tenant's share of all service. ``service``: per second.
        ``migrations``: moves by reason. ``preemptions``: how many.
    """
    began = time.process_time()
    profile = setting.profile
    policies = {PINNED: pinning(pinned, late_binding=False)} if pinned else {}
    settled = system.moves and not pinned
    scenario = Scenario(
        devices=(device(profile, 0.0, profile.num_host_blocks * profile.block_bytes),) * instances,
        engine=EngineConfig(
            scheduler=dataclasses.replace(
                setting.scheduler,
                theta=setting.theta,
                max_model_len=profile.num_blocks * profile.model.block_size,
            )
        ),
        dispatcher=DispatcherConfig(
            placement=PINNED if pinned else "freeness",
            requests=RequestConfig(
                run_ahead=RequestConfig().run_ahead if settled else None,
                max_queued=len(workload),
            ),
            rebalance=RebalanceConfig(enabled=system.moves),
        ),
        seed=seed,
        counters=system.counters,
    )
    simulation = Simulation(scenario, workload, policies=policies)
    watch = Watch(simulation, migrate, random.Random(seed))
    for asked in workload:
        watch.record.asked(asked.tenant, asked.prompt_tokens, asked.output_tokens, asked.arrival)
    simulation.clock.run_until(setting.seconds)
    preempted = 0
    for number in range(instances):
        instance = simulation.instances[instance_name(number)]
        instance.check()
        preempted += sum(instance.engine.scheduler.figures.preemptions.values())
    received = watch.record.received(0.0, setting.seconds)
    total = sum(received.values())
    windows = watch.record.differences(setting.seconds)
    shares = [gap / bound for _, gap, bound in watch.gaps]
    by_second: dict[int, tuple[float, float]] = {}
    for at, gap, bound in watch.gaps:
        by_second[int(at)] = max(gap, by_second.get(int(at), (0.0, 0.0))[0]), bound
    reasons: dict[str, int] = {}
    for _, report in simulation.dispatcher.migrations:
        if report.outcome == "moved":
            reasons[report.reason] = reasons.get(report.reason, 0) + 1
    return {
        "gap_max": max((gap for _, gap, _ in watch.gaps), default=0.0),
        "gap_mean": _mean([gap for _, gap, _ in watch.gaps]),
        "over_bound_max": max(shares, default=0.0),
        "over_bound_mean": _mean(shares),
        "bound": min((bound for _, _, bound in watch.gaps), default=0.0),
        "gaps": [[at, round(gap), round(bound)] for at, (gap, bound) in by_second.items()],
        "window_max": max(windows),
        "window_mean": _mean(windows),
        "received": {tenant: part / max(total, 1.0) for tenant, part in received.items()},
        "service": total / setting.seconds,
        "migrations": reasons,
        "preemptions": preempted,
        "cpu_seconds": time.process_time() - began,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
