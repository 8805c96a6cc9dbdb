"""How many instances does the same service take, where they come and go with the load?

Llumnix's experiment of auto-scaling (OSDI '24, section 6.5), simulated: LLaMA-7B on an A10 per
instance, up to 16 of them, long prompts and outputs, by Poisson and by bursty arrivals. The
freeness of the cluster is kept in a band; the further up the band, the more instances there
are, and the less a request waits. Two systems run the same workloads over the same bands:

INFaaS++
    places by least memory used; an instance that is to stop ends what it has first.
ours
    places by freeness, holds back what no instance has room for, moves requests, and empties
    an instance that is to stop by migration.

An instance counts from the order to start it until it has stopped. The verdict is on how many
there are on average where both have the same P99 time to first token, as read from the lines
through each system's runs.

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
from cluster.simulation.results import summarize
from cluster.simulation.simulation import Simulation
from cluster.simulation.workloads.sources import load_workload

SETTINGS = {
    **campaign.TESTBED,
    "max_instances": 16,
    "first_instances": 8,
    "width": 50.0,
    "period": 5.0,
    "cooldown": 5.0,
    "start_seconds": 10.0,
}
"""``width``: of the band, in blocks of freeness, as in the paper's artifact."""
LOADS: dict[str, tuple[float, float]] = {"Poisson": (5.0, 1.0), "bursty": (3.0, 4.0)}
"""Requests per second, and coefficient of variation of the intervals between them."""
LOWS = (-30.0, 2.0, 6.0, 15.0, 40.0)
"""Lower edges of the band; the paper's are from 5 to 85. Below 0 that many blocks are short: ours,
which serves better over each band, reaches there what the other reaches higher up."""
OURS, OTHER = "ours", "INFaaS++"
SYSTEMS = {OTHER: "infaas", OURS: "freeness"}
LEVELS = 5
"""P99 times at which instances are compared, of those that both systems reach."""
FIGURES = {
    "TTFT mean": ("latency", "ttft", "mean"),
    "TTFT P99": ("latency", "ttft", "p99"),
    "TPOT P99": ("latency", "tpot", "p99"),
    "end to end mean": ("latency", "e2e", "mean"),
    "end to end P99": ("latency", "e2e", "p99"),
    "moves": ("migrations", "moved"),
}


class Fleet:
    """Counts instances over time, as an observer of a simulation."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._present = 0
        self._seconds = 0.0
        self.most = 0

    def before(self, core: Dispatcher, event: Event, now: float) -> None:
        """An event is about to be handled."""

    def after(self, core: Dispatcher, event: Event, actions: Sequence[Action], now: float) -> None:
        """An event was handled: take the instances that there were since the one before."""
        if self._since is not None:
            self._seconds += self._present * (now - self._since)
        self._since = now
        loads = core.members.loads
        present = {n for n in loads if core.members.state(n, now) is not InstanceState.GONE}
        ordered = {name for name, what in core.scaler.orders().items() if what == START}
        self._present = len(present | ordered)
        self.most = max(self.most, self._present)

    def mean(self) -> float:
        """Instances over the time that was seen."""
        return self._seconds / self._since if self._since else 0.0


@dataclass(frozen=True, slots=True)
class Run:
    """One simulation.

    Attributes:
        load: Of ``LOADS``.
        low: Lower edge of the band.
        rate: Requests per second.
    """

    system: str
    load: str
    low: float
    rate: float
    seed: int
    requests: int

    @property
    def file_name(self) -> str:
        """Tells the run from all others, and from the same under other settings."""
        words = self.system, self.load, self.low, self.seed, self.requests
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
                    low=self.low,
                    high=self.low + SETTINGS["width"],
                    period=SETTINGS["period"],
                    cooldown=SETTINGS["cooldown"],
                ),
            ),
            self.seed,
        )
        scenario = dataclasses.replace(scenario, start_seconds=SETTINGS["start_seconds"])
        cv = LOADS[self.load][1]
        text = f"llumnix-l-l?rate={self.rate}&cv={cv}&requests={self.requests}"
        fleet = Fleet()
        outcome = Simulation(scenario, load_workload(text, self.seed), fleet).run()
        figures = summarize(outcome)
        return {
            "run": dataclasses.asdict(self),
            "settings": SETTINGS,
            "figures": {
                "instances": fleet.mean(),
                "most instances": float(fleet.most),
                **{name: campaign.found(figures, path) for name, path in FIGURES.items()},
            },
            "scaling": figures["counters"].get("scaling", {}),
            "refused": figures["refused"],
            "complete": figures["complete"],
        }


Points = Mapping[float, Mapping[str, float]]
"""Figures by lower edge, of one system under one load."""


def points_of(results: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Points]]:
    """By load, then system: the median over seeds at every edge."""
    grouped: dict[str, dict[str, dict[float, list[Mapping[str, float]]]]] = {}
    for result in results:
        run = result["run"]
        system = grouped.setdefault(run["load"], {}).setdefault(run["system"], {})
        system.setdefault(run["low"], []).append(result["figures"])
    return {
        load: {
            system: {low: campaign.medians(seeds) for low, seeds in sorted(edges.items())}
            for system, edges in systems.items()
        }
        for load, systems in grouped.items()
    }


def instances_at(points: Points, level: float) -> float:
    """The fewest instances with which the P99 time to first token is at most ``level``.

    Between two neighbouring edges the logarithm of the time is taken to change in proportion
    to the number of instances. Infinite where no run reaches the level.
    """
    runs = [(one["instances"], math.log(one["TTFT P99"])) for one in points.values()]
    wanted = math.log(level)
    best = min((count for count, time in runs if time <= wanted), default=math.inf)
    for one, other in itertools.pairwise(runs):
        (few, slow), (many, fast) = sorted((one, other), key=lambda run: -run[1])
        if fast <= wanted < slow:
            best = min(best, few + (many - few) * (slow - wanted) / (slow - fast))
    return best


def shares(ours: Points, other: Points) -> list[float]:
    """Our instances over the other's at equal times, over the range that both reach."""
    times = [[one["TTFT P99"] for one in points.values()] for points in (ours, other)]
    low, high = max(map(min, times)), min(map(max, times))
    if low >= high:
        # One is better throughout: at the best time of the worse.
        low = high = max(map(min, times))
    steps = [low * (high / low) ** (step / (LEVELS - 1)) for step in range(LEVELS)]
    return [instances_at(ours, level) / instances_at(other, level) for level in steps]


def targets_of(points: Mapping[str, Mapping[str, Points]]) -> list[Target]:
    """What must hold: the same service with fewer instances."""
    made = []
    for load, systems in points.items():
        share = campaign.geometric_mean(shares(systems[OURS], systems[OTHER]))
        made.append(Target(f"instances at equal P99 TTFT, {load}, ours over INFaaS++", share, 0.9))
    return made


def show(points: Mapping[str, Mapping[str, Points]]) -> None:
    """A row per load, edge and system."""
    head = ["load", "from", "system", "instances", "most", *FIGURES]
    rows = []
    for load, systems in points.items():
        for low in next(iter(systems.values())):
            for system, edges in systems.items():
                one = edges[low]
                figures = [one[name] for name in FIGURES]
                counts = [one["instances"], one["most instances"]]
                rows.append([load, f"{low:g}", system, *counts, *figures])
    print_table(head, rows)


def runs_of(quick: bool, requests: int, seeds: int) -> list[Run]:
    """All runs, load by load."""
    loads = list(LOADS)[:1] if quick else list(LOADS)
    lows = LOWS[1::2] if quick else LOWS
    return [
        Run(system, load, low, LOADS[load][0], seed, 300 if quick else requests)
        for load in loads
        for seed in range(1, (1 if quick else seeds) + 1)
        for low in lows
        for system in SYSTEMS
    ]


def main(arguments: list[str] | None = None) -> int:
    made = campaign.options(__doc__ or "", "scaling")
    made.add_argument("--requests", type=int, default=1000)
    made.add_argument("--seeds", type=int, default=1)
    given = made.parse_args(arguments)
    runs = runs_of(given.quick, given.requests, given.seeds)
    results = campaign.run_all(runs, given.runs, given.workers)
    points = points_of(results)
    show(points)
    result = {
        "settings": SETTINGS,
        "loads": LOADS,
        "requests": runs[0].requests,
        "seeds": len({run.seed for run in runs}),
        "complete": all(one["complete"] for one in results),
        "points": points,
    }
    return finish(result, targets_of(points), given.json)


if __name__ == "__main__":
    sys.exit(main())
