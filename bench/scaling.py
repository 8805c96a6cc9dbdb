"""How many instances does the same service take, where they come and go with the load?

Llumnix's experiment of auto-scaling (OSDI '24, section 6.5), simulated: LLaMA-7B on an A10 per
instance, up to 16 of them, long prompts and outputs at the published rate, by Poisson and by
bursty arrivals. The freeness of the cluster is kept in a band; the further up the band, the more
instances there are, and the less a request waits. Two systems run the same workloads over the
same bands:

INFaaS++
    places by least memory used; an instance that is to stop ends what it has first.
ours
    places by freeness, holds back what no instance has room for, moves requests, and empties
    an instance that is to stop by migration.

An instance counts from the order to start it until it has stopped. What counts is from
``warm_up`` on, by when as many requests are there as there will be on average, until the last
one arrives.

What is compared are the instances where both have the same P99 time to first token. The verdict
is on the five seconds for which the publication states what is saved; others are shown. The
number of instances at a time is read from the line through the runs of one seed over the lower
edges of bands of one width; bands have two widths, and the one that takes fewer counts, for
each system by itself, since a system that empties instances fast can follow the load more
closely. Ratios are of runs of one seed, so of the same requests; their geometric mean over seeds
has an interval. A system all of whose runs are better than asked is counted with the fewest
instances that it had, which are more than it needs; INFaaS++ where none is good enough with the
most, which are fewer.

    python -m bench.scaling [--quick] [--json PATH] [--runs FOLDER] [--requests N] [--seeds N]
        [--workers N]
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench import campaign
from bench.report import Target, finish, print_table
from cluster.dispatcher.core import Dispatcher, DispatcherConfig
from cluster.dispatcher.events import Action, Event
from cluster.dispatcher.rebalance import RebalanceConfig
from cluster.dispatcher.scaling import START, ScalingConfig
from cluster.dispatcher.views import InstanceState
from cluster.simulation.results import latencies
from cluster.simulation.simulation import Simulation
from cluster.simulation.workloads.sources import load_workload

SETTINGS = {
    **campaign.TESTBED,
    "max_instances": 16,
    "first_instances": 8,
    "period": 5.0,
    "cooldown": 5.0,
    "start_seconds": 10.0,
    "warm_up": 240.0,
}
"""``warm_up``: seconds from the first arrival; the longest answers take about as long."""
LOADS: dict[str, tuple[float, float]] = {"Poisson": (2.0, 1.0), "bursty": (2.0, 4.0)}
"""Requests per second, and coefficient of variation of the intervals between them: as published."""
BANDS: dict[str, tuple[tuple[float, float], ...]] = {
    "Poisson": ((-15.0, 35.0), (5.0, 55.0), (5.0, 25.0), (20.0, 40.0)),
    "bursty": ((50.0, 100.0), (85.0, 135.0), (20.0, 40.0), (40.0, 60.0)),
}
"""Freeness in blocks, by load, about where either system takes five seconds. The paper's are 50
wide, from 5 to 85; below 0 that many blocks are short."""
OURS, OTHER = "ours", "INFaaS++"
SYSTEMS = {OTHER: "infaas", OURS: "freeness"}
LEVEL = 5.0
"""P99 time to first token at which the publication compares."""
LEVELS = (LEVEL, 10.0, 20.0)
FIGURES = {
    "TTFT mean": ("ttft", "mean"),
    "TTFT P99": ("ttft", "p99"),
    "TPOT P99": ("tpot", "p99"),
    "end to end mean": ("e2e", "mean"),
    "end to end P99": ("e2e", "p99"),
}


class Fleet:
    """Counts instances over time, as an observer of a simulation.

    Args:
        first: When counting begins.
        last: When it ends.

    Attributes:
        most: Instances that there were at a time.
    """

    def __init__(self, first: float, last: float) -> None:
        self._first = self._since = first
        self._last = last
        self._present = self._leaving = 0
        self._seconds = self._leaving_seconds = 0.0
        self.most = 0

    def before(self, core: Dispatcher, event: Event, now: float) -> None:
        """An event is about to be handled."""

    def after(self, core: Dispatcher, event: Event, actions: Sequence[Action], now: float) -> None:
        """An event was handled: take the instances that there were since the one before."""
        upto = min(now, self._last)
        if upto > self._since:
            self._seconds += self._present * (upto - self._since)
            self._leaving_seconds += self._leaving * (upto - self._since)
            self._since = upto
            self.most = max(self.most, self._present)
        loads = core.members.loads
        present = {n for n in loads if core.members.state(n, now) is not InstanceState.GONE}
        ordered = {name for name, what in core.scaler.orders().items() if what == START}
        self._present = len(present | ordered)
        self._leaving = len(present & core.scaler.leaving)

    def mean(self) -> float:
        """Instances over the time that was seen."""
        return self._over(self._seconds)

    def leaving(self) -> float:
        """Of these, those that were emptied to be stopped."""
        return self._over(self._leaving_seconds)

    def _over(self, seconds: float) -> float:
        seen = self._since - self._first
        return seconds / seen if seen else 0.0


@dataclass(frozen=True, slots=True)
class Run:
    """One simulation.

    Attributes:
        load: Of ``LOADS``.
        band: Edges of the band.
        rate: Requests per second.
        warm_up: Seconds that do not count.
    """

    system: str
    load: str
    band: tuple[float, float]
    rate: float
    seed: int
    requests: int
    warm_up: float = SETTINGS["warm_up"]

    @property
    def file_name(self) -> str:
        """Tells the run from all others, and from the same under other settings."""
        words = self.system, self.load, *self.band, self.seed, self.requests
        return campaign.file_name(words, SETTINGS, self)

    def execute(self) -> dict[str, Any]:
        """The figures of the run."""
        ours = self.system == OURS
        scenario = campaign.scenario(
            SETTINGS,
            SETTINGS["first_instances"],
            DispatcherConfig(
                placement=SYSTEMS[self.system],
                # With none in flight, an instance that leaves ends what it has.
                rebalance=RebalanceConfig() if ours else RebalanceConfig(max_in_flight=0),
                scaling=ScalingConfig(
                    max_instances=SETTINGS["max_instances"],
                    low=self.band[0],
                    high=self.band[1],
                    period=SETTINGS["period"],
                    cooldown=SETTINGS["cooldown"],
                ),
            ),
            self.seed,
        )
        scenario = dataclasses.replace(scenario, start_seconds=SETTINGS["start_seconds"])
        cv = LOADS[self.load][1]
        text = f"llumnix-l-l?rate={self.rate}&cv={cv}&requests={self.requests}"
        workload = load_workload(text, self.seed)
        fleet = Fleet(self.warm_up, max(one.arrival for one in workload))
        outcome = Simulation(scenario, workload, fleet).run()
        done = [one for one in outcome.requests if one.status == "finished"]
        times = latencies([one for one in done if one.arrival >= self.warm_up])
        return {
            "run": dataclasses.asdict(self),
            "settings": SETTINGS,
            "figures": {
                "instances": fleet.mean(),
                "leaving": fleet.leaving(),
                "most instances": float(fleet.most),
                **{name: campaign.found(times, path) for name, path in FIGURES.items()},
            },
            "scaling": outcome.counters.get("scaling", {}),
            "moves": len(outcome.migrations),
            "complete": outcome.complete and len(done) == len(outcome.requests),
        }


Band = tuple[float, float]
Points = Mapping[Band, Mapping[str, float]]
"""Figures by band, of one system under one load with one seed."""
Cells = Mapping[str, Mapping[int, Mapping[str, Points]]]
"""Points by load, seed and system."""


def cells_of(results: Iterable[Mapping[str, Any]]) -> Cells:
    """Results side by side."""
    cells: dict[str, dict[int, dict[str, dict[Band, Mapping[str, float]]]]] = {}
    for result in results:
        run = result["run"]
        systems = cells.setdefault(run["load"], {}).setdefault(run["seed"], {})
        low, high = run["band"]
        systems.setdefault(run["system"], {})[low, high] = result["figures"]
    return cells


def instances_at(points: Points, level: float) -> float:
    """The fewest instances with which the P99 time to first token is at most ``level``.

    Between neighbouring edges of bands of one width the logarithm of the time is taken to
    change in proportion to the number of instances. Infinite where no run reaches the level.
    """
    wanted = math.log(level)
    best = math.inf
    for width in {high - low for low, high in points}:
        runs = [
            (one["instances"], math.log(one["TTFT P99"]))
            for (low, high), one in sorted(points.items())
            if high - low == width
        ]
        best = min([best, *(count for count, time in runs if time <= wanted)])
        for one, other in itertools.pairwise(runs):
            (few, slow), (many, fast) = sorted((one, other), key=lambda run: -run[1])
            if fast <= wanted < slow:
                best = min(best, few + (many - few) * (slow - wanted) / (slow - fast))
    return best


def shares(seeds: Mapping[int, Mapping[str, Points]], level: float) -> list[float]:
    """Our instances over the other's at ``level``, for each seed.

    Where the other never reaches it, its most instances count, which are fewer than it needs;
    infinite where ours does not.
    """
    found = []
    for systems in seeds.values():
        ours, other = (instances_at(systems[name], level) for name in (OURS, OTHER))
        most = max(one["instances"] for one in systems[OTHER].values())
        found.append(ours / min(other, most))
    return found


def targets_of(cells: Cells) -> list[Target]:
    """What must hold: the same service with fewer instances."""
    return [
        Target(
            f"instances at a P99 TTFT of {LEVEL:g} s, {load}, ours over INFaaS++",
            campaign.geometric_mean(shares(seeds, LEVEL)),
            0.9,
        )
        for load, seeds in cells.items()
    ]


def show(cells: Cells) -> None:
    """A row per load, band and system, medians over seeds; then one per load and level."""
    rows: list[Sequence[Any]] = []
    for load, seeds in cells.items():
        for band in sorted(
            next(iter(seeds.values()))[OURS], key=lambda one: (one[0] - one[1], one)
        ):
            for system in SYSTEMS:
                one = campaign.medians([systems[system][band] for systems in seeds.values()])
                rows.append([load, f"{band[0]:g}..{band[1]:g}", system, *one.values()])
    print_table(["load", "band", "system", "instances", "leaving", "most", *FIGURES], rows)
    rows = []
    for load, seeds in cells.items():
        for level in LEVELS:
            found = shares(seeds, level)
            low, high = campaign.interval(found)
            counts = [
                campaign.geometric_mean(
                    instances_at(systems[name], level) for systems in seeds.values()
                )
                for name in SYSTEMS
            ]
            share = campaign.geometric_mean(found)
            rows.append([load, level, *counts, share, f"{low:.3f}-{high:.3f}", len(found)])
    print("instances at equal P99 time to first token; the interval is of the share, at 95 %")
    print_table(["load", "P99 TTFT (s)", *SYSTEMS, "share", "interval", "seeds"], rows)


def runs_of(quick: bool, requests: int, seeds: int) -> list[Run]:
    """All runs, load by load."""
    if quick:
        return [
            Run(system, "Poisson", band, 2.0, 1, 150, 30.0)
            for band in BANDS["Poisson"][2:]
            for system in SYSTEMS
        ]
    return [
        Run(system, load, band, rate, seed, requests)
        for load, (rate, _) in LOADS.items()
        for seed in range(1, seeds + 1)
        for band in BANDS[load]
        for system in SYSTEMS
    ]


def main(arguments: list[str] | None = None) -> int:
    made = campaign.options(__doc__ or "", "scaling")
    made.add_argument("--requests", type=int, default=3000)
    made.add_argument("--seeds", type=int, default=5)
    given = made.parse_args(arguments)
    runs = runs_of(given.quick, given.requests, given.seeds)
    results = campaign.run_all(runs, given.runs, given.workers)
    cells = cells_of(results)
    show(cells)
    result = {
        "settings": SETTINGS,
        "loads": LOADS,
        "requests": runs[0].requests,
        "complete": all(one["complete"] for one in results),
        "cells": [
            {"load": load, "seed": seed, "system": system, "band": band, "figures": figures}
            for load, seeds in cells.items()
            for seed, systems in seeds.items()
            for system, points in systems.items()
            for band, figures in points.items()
        ],
    }
    return finish(result, targets_of(cells), given.json)


if __name__ == "__main__":
    sys.exit(main())
