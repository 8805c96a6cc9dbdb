"""What a cluster costs under a mixed load beside its simulation: contention, scatter of steps."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import numpy as np

from cluster.config import ServeConfig
from cluster.replay.run import replay_greedily
from cluster.simulation.calibration import CalibrationError
from cluster.simulation.device import device
from cluster.simulation.network import NetworkConfig
from cluster.simulation.profile import CostProfile
from cluster.simulation.profile_check import Check
from cluster.simulation.scatter import Scatter
from cluster.simulation.scatter_fit import Work, fit_scatter, shown_by
from cluster.simulation.simulation import Scenario, Simulation
from cluster.simulation.workloads.generators import single_requests
from cluster.simulation.workloads.records import WorkloadRequest
from instance.budget import attended

REQUESTS, QUICK_REQUESTS = 160, 80
_PROMPT = (64, 384)
_OUTPUT = (24, 48)
"""Least and most tokens of a request, where the model takes so many."""
_RUNNING = 1.0
"""Requests that run on an instance at the same time, on average."""
_SEED = 5
_SEEDS = 4
"""Simulations under one law."""
_ENDS = 0.05
"""Share of first tokens, at either end, that says nothing of contention."""
_ROUNDS = 3
"""Of looking for it."""


class Times(NamedTuple):
    """Seconds of a request: to the first token, and from there to the last."""

    first: float
    rest: float


@dataclass(frozen=True, slots=True)
class Limits:
    """What the cluster is: equal instances, and how many sequences each runs at once."""

    instances: int
    max_num_seqs: int


def mixed_load(profile: CostProfile, instances: int, count: int) -> list[WorkloadRequest]:
    """Requests of mixed lengths at random times, so many that instances are busy but not full."""
    rng = np.random.default_rng(_SEED)
    room = min(profile.model.max_model_len, profile.num_blocks * profile.model.block_size)
    prompts, outputs = (
        rng.integers(min(least, most), most + 1, count)
        for least, most in (
            (_PROMPT[0], min(_PROMPT[1], room // 2)),
            (_OUTPUT[0], min(_OUTPUT[1], room // 4)),
        )
    )
    length, output, step = int(prompts.mean()), float(outputs.mean()), profile.step
    alone = profile.overhead + step.of(length, attended(0, length), 0, 0)
    alone += output * step.of(0, 0, 1, length)
    arrivals = rng.exponential(alone / (_RUNNING * instances), count).cumsum()
    return single_requests(arrivals.tolist(), prompts.tolist(), outputs.tolist())


def with_mixed_load(
    url: str,
    client_key: str,
    profile: CostProfile,
    limits: Limits,
    quick: bool,
    progress: Callable[[str], None],
) -> tuple[CostProfile, list[Check]]:
    """Send a mixed load to a cluster, simulate it, and see how far the two are apart.

    Args:
        url: Of the cluster.
        client_key: A key that its clients send.
        profile: What it costs while it is idle, and without scatter.
        limits: Of its instances.
        quick: Fewer requests.
        progress: Told what came out.

    Returns:
        The profile with how steps scatter, and by how much requests that meet delay each
        other; means over the load as measured, and as simulated without that delay.

    Raises:
        CalibrationError: if nothing was answered.
    """
    asked = mixed_load(profile, limits.instances, QUICK_REQUESTS if quick else REQUESTS)
    # Contents of their own each time: no prefix cache shortens a prefill.
    replay = asyncio.run(replay_greedily(url, client_key, asked, secrets.randbits(32)))
    done = sorted(
        (one for one in replay.results if not one.failure and one.arrivals),
        key=lambda one: one.sent,
    )
    if not done:
        raise CalibrationError("no request of a mixed load was answered")
    sent = [dataclasses.replace(asked[one.number], arrival=one.sent) for one in done]
    seen = [Times(one.ttft, one.arrivals[-1] - one.arrivals[0]) for one in done]
    simulated = Simulated(sent, profile, limits)
    scatter = fitted(seen, simulated, profile.overhead)
    found = simulated.times(scatter)
    checks = [
        Check(
            f"mixed load: mean {what}",
            fmean(getattr(one, name) for one in seen),
            fmean(getattr(one, name) for one in found),
        )
        for what, name in (("time to the first token", "first"), ("time after it", "rest"))
    ]
    if scatter is None:
        progress(f"mixed load: {len(seen)} answers tell of no scatter")
    else:
        low, high = scatter.speeds[0], scatter.speeds[-1]
        progress(f"mixed load: speeds of {low:.2f} to {high:.2f}, {scatter.spell:.2f} s each")
    contention = contended(seen, sent, dataclasses.replace(profile, scatter=scatter), limits)
    progress(f"mixed load: first tokens {1000 * contention:.1f} ms later where requests meet")
    return dataclasses.replace(profile, contention=contention, scatter=scatter), checks


def contended(
    seen: Sequence[Times],
    asked: Sequence[WorkloadRequest],
    profile: CostProfile,
    limits: Limits,
) -> float:
    """The contention with which simulations of a load have first tokens as late as was seen.

    The mean counts, without the ends: one stall is not what a request costs.

    Args:
        seen: Times of the load's requests.
        asked: The load.
        profile: Of the instances; what it says of contention is not looked at.
        limits: Of the instances.
    """
    wanted, found = _middle(seen), 0.0
    for _ in range(_ROUNDS):
        simulated = Simulated(asked, dataclasses.replace(profile, contention=found), limits)
        runs = [simulated.times(profile.scatter, seed) for seed in range(_SEEDS)]
        meeting = fmean(_meeting(asked, run) for run in runs)
        late = wanted - fmean(_middle(run) for run in runs)
        found = max(0.0, found + late / meeting) if meeting else 0.0
    return found


def _meeting(asked: Sequence[WorkloadRequest], times: Sequence[Times]) -> float:
    """The share of requests that come while another one waits for its first token."""
    number, until = 0, -math.inf
    for one, its in zip(asked, times, strict=True):
        number += one.arrival < until
        until = max(until, one.arrival + its.first)
    return number / len(times)


def _middle(times: Sequence[Times]) -> float:
    firsts = sorted(one.first for one in times)
    cut = int(len(firsts) * _ENDS)
    return fmean(firsts[cut : len(firsts) - cut])


class Simulated:
    """A load whose requests come when they were really sent, simulated.

    Args:
        asked: The load.
        profile: Of the instances; what it says of scatter is not looked at.
        limits: Of the instances.
    """

    def __init__(
        self, asked: Sequence[WorkloadRequest], profile: CostProfile, limits: Limits
    ) -> None:
        serve = ServeConfig(
            max_num_seqs=limits.max_num_seqs, max_model_len=profile.model.max_model_len
        )
        self._asked = asked
        self._profile = profile
        self._instances = limits.instances
        self._scenario = Scenario(
            devices=(),
            engine=serve.engine("cpu"),
            dispatcher=serve.dispatcher(),
            network=NetworkConfig().with_overhead(profile.overhead, profile.contention),
        )

    def times(self, scatter: Scatter | None, seed: int = 0) -> list[Times]:
        """Of each request."""
        made = device(dataclasses.replace(self._profile, scatter=scatter), 0.0)
        scenario = dataclasses.replace(self._scenario, devices=(made,) * self._instances, seed=seed)
        outcome = Simulation(scenario, self._asked).run()
        return [
            Times(one.times[0] - one.arrival, one.times[-1] - one.times[0])
            for one in outcome.requests
        ]


def fitted(seen: Sequence[Times], simulated: Simulated, overhead: float) -> Scatter | None:
    """The law under which simulations of a load differ as much as what was seen does.

    Args:
        seen: Times of the load's requests.
        simulated: The load.
        overhead: Seconds until a first token that are no steps.
    """
    even = simulated.times(None)

    def fit(runs: Sequence[Sequence[Times]]) -> Scatter | None:
        pairs = []
        for run in runs:
            for one, two in zip(run, even, strict=True):
                first, predicted = one.first - overhead, two.first - overhead
                if min(first, predicted, one.rest, two.rest) > 0.0:
                    pairs.append((Work(first, predicted), Work(one.rest, two.rest)))
        return fit_scatter(pairs)

    measured = fit([seen])
    if measured is None:
        return None
    return shown_by(
        measured, lambda law: fit([simulated.times(law, seed) for seed in range(_SEEDS)])
    )
