"""Small simulated clusters for tests: a device that is quickly full, and short workloads."""

from __future__ import annotations

import random
from typing import Any

from cluster.dispatcher.core import DispatcherConfig
from cluster.dispatcher.events import Action, Event
from cluster.dispatcher.rebalance import RebalanceConfig
from cluster.simulation.device import device
from cluster.simulation.network import NetworkConfig
from cluster.simulation.profile import CopyCost, CostProfile, LinkCost
from cluster.simulation.scatter import Scatter
from cluster.simulation.simulation import Death, Outcome, Scenario, Simulation
from cluster.simulation.workloads.records import Span, WorkloadRequest
from instance.config import EngineConfig, MigrationConfig, SchedulerConfig
from instance.executor import ModelDescription
from instance.step_cost import StepCost

BLOCK_SIZE = 16


def profile(
    blocks: int = 64, speed: float = 1.0, host_blocks: int = 0, scatter: Scatter | None = None
) -> CostProfile:
    """A device with ``blocks`` KV blocks, ``speed`` times as fast as the usual one."""
    model = ModelDescription("toy", "float16", BLOCK_SIZE, 2, 2, 8, 512, 1024, (511,))
    return CostProfile(
        name="toy",
        model=model,
        step=StepCost(
            base=0.02 / speed,
            prefill_token=2e-4 / speed,
            decode_sequence=5e-4 / speed,
            context_token=2e-6 / speed,
            prefill_context=1e-8 / speed,
        ),
        copy_out=CopyCost(2e6, 1e-5),
        copy_in=CopyCost(2e6, 1e-5),
        link=LinkCost(1e6, 1e-5, 5e-4),
        num_blocks=blocks,
        num_host_blocks=host_blocks,
        scatter=scatter,
    )


def scenario(
    instances: int = 3,
    *,
    blocks: int = 64,
    placement: str = "freeness",
    rebalance: bool = True,
    jumps: bool = True,
    deaths: tuple[Death, ...] = (),
    prefix_caching: bool = True,
    host_blocks: int = 0,
    theta: float | None = None,
    seed: int = 0,
    scatter: Scatter | None = None,
    contention: float = 0.0,
) -> Scenario:
    """A small cluster that is easily full."""
    return Scenario(
        devices=(
            device(
                profile(blocks, host_blocks=host_blocks, scatter=scatter),
                share=1e6,
                host_bytes=float("inf"),
            ),
        )
        * instances,
        engine=EngineConfig(
            scheduler=SchedulerConfig(
                max_num_seqs=32,
                max_num_batched_tokens=256,
                max_model_len=blocks * BLOCK_SIZE,
                enable_prefix_caching=prefix_caching,
                theta=theta,
            ),
            migration=MigrationConfig(max_bytes_per_second=1e9),
        ),
        dispatcher=DispatcherConfig(
            placement=placement, rebalance=RebalanceConfig(enabled=rebalance)
        ),
        max_tokens=512,
        seed=seed,
        deaths=deaths,
        jumps=jumps,
        network=NetworkConfig(contention=contention),
    )


def workload(
    count: int = 60,
    rate: float = 6.0,
    seed: int = 0,
    tenants: tuple[str, ...] = ("default",),
    shared: int = 0,
) -> list[WorkloadRequest]:
    """Requests of which some are long; the first ``shared`` tokens of every second are alike."""
    rng = random.Random(seed)
    made, at = [], 0.0
    for number in range(count):
        at += rng.expovariate(rate)
        made.append(
            WorkloadRequest(
                at,
                (
                    *([Span("shared", shared)] if shared and number % 2 else []),
                    Span(f"r{number}", rng.choice((5, 30, 200, 350))),
                ),
                rng.choice((1, 20, 120, 300)),
                tenant=tenants[number % len(tenants)],
            )
        )
    return made


class Decisions:
    """Writes down what the policy was told and what it decided; an ``Observer``."""

    def __init__(self) -> None:
        self.told: list[tuple[float, str]] = []
        self.all: list[tuple[float, str]] = []

    def before(self, core: Any, event: Event, now: float) -> None:
        self.told.append((now, repr(event)))

    def after(self, core: Any, event: Event, actions: list[Action], now: float) -> None:
        self.all.extend((now, repr(action)) for action in actions)


def simulate(
    given: Scenario, requests: list[WorkloadRequest], observer: Any = None
) -> tuple[Simulation, Outcome]:
    """Run to the end."""
    simulation = Simulation(given, requests, observer)
    return simulation, simulation.run()


def summary(outcome: Outcome) -> Any:
    """Everything that two equal runs have in common, to the last bit."""
    return (
        [
            (
                one.request_id,
                one.status,
                one.times.tobytes(),
                one.placed,
                repr(one.started),
                one.instances,
                one.moves,
                one.transfer,
                one.joining,
                one.preemptions,
                one.preemption_loss,
                one.pauses,
                one.replays,
                one.cached,
            )
            for one in outcome.requests
        ],
        [
            (name, *(of.tobytes() for of in (one.times, one.used, one.running, one.waiting)))
            for name, one in outcome.instances.items()
        ],
        outcome.migrations,
        outcome.seconds,
        outcome.steps,
        outcome.counters,
    )
