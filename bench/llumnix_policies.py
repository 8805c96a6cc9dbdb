"""Do our policies place and move requests better than those they build on?

The experiment of Llumnix (OSDI '24, figure 11), simulated: 16 instances of LLaMA-7B on an A10
with 12,800 tokens of KV each, Poisson arrivals, prompt and output lengths by the published
laws, at the published rates and at one and a half times the highest of them, since chunked
prefill bears more than the instances of that time. Round robin, INFaaS++ (least memory used,
nothing moves), Llumnix's rules as released, and ours run the same workloads on the same
simulated instances; nothing but the dispatcher's policy differs.

Each run is a file in the folder --runs; one that is there is not run again, so that a bench
that was stopped goes on where it was. --requests 10000 is the form for a verdict, 3,000 that
for development.

    python -m bench.llumnix_policies [--quick] [--json PATH] [--runs FOLDER] [--requests N]
        [--seeds N] [--workloads NAMES] [--workers N]
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bench import campaign
from bench.report import Target, finish, median, print_table
from cluster.dispatcher.core import DispatcherConfig
from cluster.dispatcher.rebalance import RebalanceConfig
from cluster.dispatcher.requests import RequestConfig
from cluster.simulation.results import summarize
from cluster.simulation.simulation import Simulation
from cluster.simulation.workloads.sources import load_workload

BEYOND = 1.5
"""Of the highest published rate: what saturates instances with chunked prefill."""
RATES: dict[str, tuple[float, ...]] = {
    "llumnix-s-s": (32, 35, 38),
    "llumnix-m-m": (7.4, 7.7, 8.0),
    "llumnix-l-l": (2.6, 2.9, 3.2),
    "llumnix-s-l": (4.1, 4.25, 4.4),
    "llumnix-l-s": (10, 16, 22),
    "llumnix-sharegpt": (7.0, 7.5, 8.0),
}
"""Requests per second, for 16 instances."""
INSTANCES = 16
POLICIES = {
    "round robin": ("round_robin", False),
    "INFaaS++": ("infaas", True),
    "Llumnix": ("llumnix", True),
    "ours": ("freeness", True),
}
"""The dispatcher's name of each, and whether it brings rules of its own; a round robin that
only rotates holds nothing back and moves nothing."""
OURS = "ours"
FIGURES: dict[str, tuple[str, ...]] = {
    "TTFT mean": ("latency", "ttft", "mean"),
    "TTFT P99": ("latency", "ttft", "p99"),
    "TPOT mean": ("latency", "tpot", "mean"),
    "TPOT P99": ("latency", "tpot", "p99"),
    "end to end mean": ("latency", "e2e", "mean"),
    "end to end P99": ("latency", "e2e", "p99"),
    "preemption loss": ("preemptions", "loss_mean"),
    "preemptions": ("preemptions", "count"),
    "moves": ("migrations", "moved"),
    "fragmented": ("fragmentation", "mean"),
    "KV used": ("balance", "kv_mean"),
    "refused": ("refused_count",),
}
SETTINGS = campaign.TESTBED
"""What every run has in common."""


@dataclass(frozen=True, slots=True)
class Run:
    """One simulation."""

    workload: str
    rate: float
    policy: str
    seed: int
    requests: int
    instances: int

    @property
    def file_name(self) -> str:
        """Tells the run from all others, and from the same under other settings."""
        words = self.workload, self.rate, self.policy, self.seed, self.requests
        return campaign.file_name(words, SETTINGS, self)

    def execute(self) -> dict[str, Any]:
        """The figures of the run."""
        placement, own_rules = POLICIES[self.policy]
        scenario = campaign.scenario(
            SETTINGS,
            self.instances,
            DispatcherConfig(
                placement=placement,
                rebalance=RebalanceConfig(enabled=own_rules),
                requests=RequestConfig() if own_rules else RequestConfig(run_ahead=None),
            ),
            self.seed,
        )
        text = f"{self.workload}?rate={self.rate}&requests={self.requests}"
        began = time.process_time()
        outcome = Simulation(scenario, load_workload(text, self.seed)).run()
        seconds = time.process_time() - began
        figures = summarize(outcome)
        figures["refused_count"] = sum(figures["refused"].values())
        return {
            "run": dataclasses.asdict(self),
            "settings": SETTINGS,
            "figures": {name: campaign.found(figures, path) for name, path in FIGURES.items()},
            "migrations": figures["migrations"]["by_reason"],
            "complete": figures["complete"],
            "lost_tokens": figures["lost_tokens"],
            "simulated_seconds": outcome.seconds,
            "times_real_time": outcome.seconds / max(seconds, 1e-9),
        }


Cells = dict[tuple[str, float], dict[str, dict[str, float]]]


def cells_of(results: Iterable[Mapping[str, Any]]) -> Cells:
    """By workload and rate, then policy: the median over seeds of every figure."""
    grouped: dict[tuple[str, float], dict[str, list[Mapping[str, float]]]] = {}
    for result in results:
        run = result["run"]
        cell = grouped.setdefault((run["workload"], run["rate"]), {})
        cell.setdefault(run["policy"], []).append(result["figures"])
    return {
        key: {policy: campaign.medians(seeds) for policy, seeds in cell.items()}
        for key, cell in grouped.items()
    }


def ratio(cells: Cells, figure: str, other: str) -> float:
    """Ours over another's, geometric mean over all cells in which both are above 0."""
    return campaign.geometric_mean(
        cell[OURS][figure] / cell[other][figure]
        for cell in cells.values()
        if cell[OURS][figure] > 0 and cell[other][figure] > 0
    )


def share(cells: Cells, figure: str, other: str) -> float:
    """The sum of ours over all cells, over another's."""
    theirs = sum(cell[other][figure] for cell in cells.values())
    return sum(cell[OURS][figure] for cell in cells.values()) / theirs if theirs else 0.0


def targets_of(cells: Cells) -> list[Target]:
    """What must hold for the policies to be worth having."""

    def of(figure: str, other: str) -> float:
        return ratio(cells, figure, other)

    return [
        Target("P99 TTFT, ours over round robin", of("TTFT P99", "round robin"), 0.5),
        Target("mean end to end, ours over round robin", of("end to end mean", "round robin"), 0.8),
        Target("P99 TTFT, ours over INFaaS++", of("TTFT P99", "INFaaS++"), 1.0),
        Target("P99 TPOT, ours over INFaaS++", of("TPOT P99", "INFaaS++"), 1.0),
        Target("mean end to end, ours over INFaaS++", of("end to end mean", "INFaaS++"), 1.0),
        # Llumnix takes 70.4 % off it.
        Target(
            "preemption loss, ours over INFaaS++", share(cells, "preemption loss", "INFaaS++"), 0.3
        ),
        Target("mean TTFT, ours over Llumnix", of("TTFT mean", "Llumnix"), 1.0),
        Target("P99 TTFT, ours over Llumnix", of("TTFT P99", "Llumnix"), 1.0),
        Target("mean end to end, ours over Llumnix", of("end to end mean", "Llumnix"), 1.0),
    ]


def show(cells: Cells) -> None:
    """A table per workload and rate."""
    head = ["workload", "rate", "policy", *FIGURES]
    rows = [
        [workload, f"{rate:g}", policy, *(figures[name] for name in FIGURES)]
        for (workload, rate), cell in cells.items()
        for policy, figures in cell.items()
    ]
    print_table(head, rows)


def runs_of(given: argparse.Namespace) -> list[Run]:
    """All runs, workload by workload, so that a part of them can be compared."""
    if given.quick:
        # A quarter of the cluster under a quarter of the load.
        rate = BEYOND * RATES["llumnix-m-m"][-1] / 4
        return [Run("llumnix-m-m", rate, policy, 1, 600, INSTANCES // 4) for policy in POLICIES]
    return [
        Run(workload, rate, policy, seed, given.requests, INSTANCES)
        for workload in given.workloads
        for rate in (*RATES[workload], round(BEYOND * RATES[workload][-1], 3))
        for seed in range(1, given.seeds + 1)
        for policy in POLICIES
    ]


def main(arguments: list[str] | None = None) -> int:
    made = campaign.options(__doc__ or "", "llumnix_policies")
    made.add_argument("--requests", type=int, default=3000)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--workloads", nargs="+", choices=list(RATES), default=list(RATES))
    given = made.parse_args(arguments)
    runs = runs_of(given)
    results = campaign.run_all(runs, given.runs, given.workers)
    cells = cells_of(results)
    show(cells)
    speed = median(one["times_real_time"] for one in results)
    print(f"simulated at {speed:.0f} times real time (median run, one core)")
    result = {
        "settings": SETTINGS,
        "requests": runs[0].requests,
        "seeds": len({run.seed for run in runs}),
        "times_real_time": speed,
        "complete": all(one["complete"] for one in results),
        "cells": [
            {"workload": workload, "rate": rate, "policies": cell}
            for (workload, rate), cell in cells.items()
        ],
    }
    return finish(result, targets_of(cells), given.json)


if __name__ == "__main__":
    sys.exit(main())
