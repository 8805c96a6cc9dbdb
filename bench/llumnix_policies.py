"""Do our policies place and move requests better than those they build on?

The serving experiment of Llumnix (OSDI '24, figure 11), simulated: 16 instances of LLaMA-7B on
an A10 with 12,800 tokens of KV each, Poisson arrivals, prompt and output lengths by the
published laws, 10,000 requests per run. Round robin, INFaaS++ (least memory used, nothing
moves), Llumnix's rules as released, and ours run the same workloads on the same simulated
instances; nothing but the dispatcher's policy differs. The first three send every request on
at once, to wait where it was sent, first come first served; a preempted one is computed anew.

Rates follow from the lengths alone: at the saturating rate, answers that are written at the
pace of a full batch fill all KV (see ``saturating_rate``; the published rates lie between 0.7
and 1.1 of it). Each workload runs at four shares of its own. Answers live for minutes, so a
run must be long enough for them to fill memory: 10,000 requests on 16 instances, or, the form
for development, 3,000 on 4 instances under a quarter of the load.

Cells that count against Llumnix are those where memory is what INFaaS++ waits for: its P99
time to first token is above three times the unloaded one. Llumnix's threshold is the best of
a sweep, by workload (--sweep).

All policies run all cells on three seeds. More seeds are for the cells that count, and there for
all policies but round robin, which nothing is compared with.

Each run is a file in the folder --runs; one that is there is not run again, so that a bench
that was stopped goes on where it was.

    python -m bench.llumnix_policies [--quick] [--json PATH] [--runs FOLDER] [--workers N]
        [--form development|verdict] [--seeds N] [--workloads NAMES] [--shares NUMBERS]
        [--sweep]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from bench import campaign
from bench.report import Target, finish, median, print_table
from cluster.dispatcher.core import DispatcherConfig
from cluster.dispatcher.rebalance import RebalanceConfig
from cluster.dispatcher.requests import RequestConfig
from cluster.simulation.profile_files import load_profile
from cluster.simulation.results import summarize
from cluster.simulation.simulation import Simulation
from cluster.simulation.workloads.sources import load_workload

WORKLOADS = ("s-s", "m-m", "l-l", "s-l", "l-s", "sharegpt")
SHARES = (0.75, 0.85, 0.9, 0.95)
"""Of the saturating rate."""
UNLOADED = 0.1
"""Share of the saturating rate at which nothing waits for memory."""
TAIL = 3.0
"""Times its unloaded P99 TTFT that INFaaS++ must have where policies are compared."""
FIRST_SEEDS = 3
"""On which every cell is run."""
FORMS = {"development": (3000, 4), "verdict": (10_000, 16)}
"""Requests of a run, and instances."""
THRESHOLDS = (1.5, 3.0, 10.0, 30.0)
"""Remaining steps that divide Llumnix's sources from its destinations, to sweep."""
BEST_THRESHOLD = {"s-s": 3.0, "m-m": 3.0, "l-l": 3.0, "s-l": 30.0, "l-s": 3.0, "sharegpt": 3.0}
"""Those with the least P99 TTFT, by the sweep."""
POLICIES = {
    "round robin": "round_robin",
    "INFaaS++": "infaas",
    "Llumnix": "llumnix",
    "ours": "freeness",
}
"""The dispatcher's name of each."""
OURS = "ours"
LLUMNIX_INTERVAL = 0.2
"""Seconds between Llumnix's rounds: four steps of each instance, as in its artifact."""
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


@functools.cache
def saturating_rate(workload: str, instances: int) -> float:
    """Requests per second that fill all KV, if each token is written at a full batch's pace.

    A request holds a KV slot per prompt token all the time that it writes its answer, and one
    per token of the answer from then on. Lengths are those of one sample of the workload.
    """
    sample = load_workload(f"llumnix-{workload}?rate=1&requests=20000", 0)
    prompts = [one.prompt_tokens for one in sample]
    outputs = [one.output_tokens for one in sample]
    token_steps = sum(p * o + o * (o + 1) / 2 for p, o in zip(prompts, outputs, strict=True))
    held = token_steps / sum(outputs)
    capacity: float = SETTINGS["kv_tokens"]
    step = load_profile(SETTINGS["profile"]).step.of(0, 0, round(capacity / held), int(capacity))
    return instances * capacity * len(sample) / (token_steps * step)


@dataclass(frozen=True, slots=True)
class Run:
    """One simulation.

    Attributes:
        share: Of the saturating rate.
        threshold: Llumnix's; 0 for the others.
    """

    workload: str
    share: float
    policy: str
    seed: int
    requests: int
    instances: int
    threshold: float = 0.0

    @property
    def rate(self) -> float:
        """Requests per second."""
        return round(self.share * saturating_rate(self.workload, self.instances), 3)

    @property
    def file_name(self) -> str:
        """Tells the run from all others, and from the same under other settings."""
        words = (self.workload, self.share, self.policy, self.seed, self.requests)
        return campaign.file_name(words, SETTINGS, self)

    def dispatcher(self) -> DispatcherConfig:
        """The policy. Where requests wait in the dispatcher, and which rules move them, goes
        with its name; a round robin that only rotates holds nothing back and moves nothing."""
        placement = POLICIES[self.policy]
        if self.policy == "round robin":
            return DispatcherConfig(
                placement=placement,
                rebalance=RebalanceConfig(enabled=False),
                requests=RequestConfig(run_ahead=None),
            )
        if self.policy == "Llumnix":
            rules = RebalanceConfig(interval=LLUMNIX_INTERVAL, llumnix_threshold=self.threshold)
            return DispatcherConfig(placement=placement, rebalance=rules)
        return DispatcherConfig(placement=placement)

    def execute(self) -> dict[str, Any]:
        """The figures of the run."""
        scenario = campaign.scenario(SETTINGS, self.instances, self.dispatcher(), self.seed)
        text = f"llumnix-{self.workload}?rate={self.rate}&requests={self.requests}"
        began = time.process_time()
        outcome = Simulation(scenario, load_workload(text, self.seed)).run()
        seconds = time.process_time() - began
        figures = summarize(outcome)
        figures["refused_count"] = sum(figures["refused"].values())
        return {
            "run": dataclasses.asdict(self),
            "rate": self.rate,
            "settings": SETTINGS,
            "figures": {name: campaign.found(figures, path) for name, path in FIGURES.items()},
            "migrations": figures["migrations"]["by_reason"],
            "complete": figures["complete"],
            "lost_tokens": figures["lost_tokens"],
            "simulated_seconds": outcome.seconds,
            "times_real_time": outcome.seconds / max(seconds, 1e-9),
        }


# ---- what comes of the runs

Cell = tuple[str, float]
"""Workload and share."""
Figures = Mapping[str, float]
Cells = dict[Cell, dict[str, dict[int, Figures]]]
"""By cell and policy: the figures of every seed."""


def cells_of(results: Iterable[Mapping[str, Any]]) -> Cells:
    """The results of all runs by cell, policy and seed."""
    cells: Cells = {}
    for result in results:
        run = result["run"]
        cell = cells.setdefault((run["workload"], run["share"]), {})
        cell.setdefault(run["policy"], {})[run["seed"]] = result["figures"]
    return cells


def unloaded_tails(results: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """By workload the P99 TTFT of the runs in which nothing waits."""
    return {result["run"]["workload"]: result["figures"]["TTFT P99"] for result in results}


def loaded(cells: Cells, unloaded: Mapping[str, float]) -> Cells:
    """The cells in which INFaaS++ waits for memory: its median P99 TTFT tells."""
    return {
        key: cell
        for key, cell in cells.items()
        if median(one["TTFT P99"] for one in cell["INFaaS++"].values()) > TAIL * unloaded[key[0]]
    }


def ratios(cells: Cells, figure: str, one: str, other: str) -> dict[str, list[float]]:
    """By workload: ``one`` over ``other``, for every cell and seed that both ran."""
    found: dict[str, list[float]] = {}
    for (workload, _), cell in cells.items():
        theirs = cell[other]
        for seed, figures in cell[one].items():
            if seed in theirs and figures[figure] > 0 and theirs[seed][figure] > 0:
                found.setdefault(workload, []).append(figures[figure] / theirs[seed][figure])
    return found


def overall(by_workload: Mapping[str, Sequence[float]]) -> float:
    """Geometric mean over workloads of theirs."""
    return campaign.geometric_mean(
        campaign.geometric_mean(values) for values in by_workload.values()
    )


def best_cell(cells: Cells, figure: str, one: str, other: str) -> float:
    """The least of the cells' geometric means of ``one`` over ``other``; nan for none."""
    found = (ratios({key: cell}, figure, one, other).values() for key, cell in cells.items())
    means = [campaign.geometric_mean(*values) for values in found if values]
    return min(means, default=float("nan"))


def worst(by_workload: Mapping[str, Sequence[float]]) -> float:
    """The largest of the workloads' geometric means; nan for none."""
    found = [campaign.geometric_mean(values) for values in by_workload.values()]
    return max(found, default=float("nan"))


def kept(cells: Cells, figure: str, one: str, other: str) -> float:
    """The mean over cells of the part of a figure that is left, where there was any."""
    parts = []
    for cell in cells.values():
        mean, before = (
            fmean(figures[figure] for figures in cell[policy].values()) for policy in (one, other)
        )
        if before:
            parts.append(mean / before)
    return fmean(parts) if parts else 0.0


def targets_of(every: Cells, cells: Cells) -> list[Target]:
    """What must hold in the loaded ``cells``.

    The first four say that the rules of Llumnix, as they are here, bring what they brought
    in its paper. It tells the P99 TTFT of the rate at which they bring most, of one run each
    ("up to 14.8 times"): here a cell's geometric mean over its seeds must come down to a third,
    and the mean of all cells must come down. Preemption loss by 70.4 % is a mean over all
    rates, and so over ``every`` cell here. The others are what ours must bring beyond them.
    """
    base, theirs = "INFaaS++", "Llumnix"
    first = ratios(cells, "TTFT P99", OURS, theirs)
    last = ratios(cells, "end to end mean", OURS, theirs)
    return [
        Target("P99 TTFT, Llumnix/INFaaS++", overall(ratios(cells, "TTFT P99", theirs, base)), 1.0),
        Target(
            "P99 TTFT, Llumnix/INFaaS++, best workload and rate",
            best_cell(cells, "TTFT P99", theirs, base),
            1 / 3,
        ),
        Target(
            "mean end to end, Llumnix/INFaaS++",
            overall(ratios(cells, "end to end mean", theirs, base)),
            1.0,
        ),
        Target(
            "preemption loss, Llumnix/INFaaS++", kept(every, "preemption loss", theirs, base), 0.5
        ),
        Target("P99 TTFT, ours/Llumnix", overall(first), 0.9),
        Target("P99 TTFT, ours/Llumnix, worst workload", worst(first), 1.02),
        Target("mean end to end, ours/Llumnix, worst workload", worst(last), 1.03),
    ]


def show(cells: Cells, counted: Cells) -> None:
    """A table per cell, medians over seeds, and one of ratios with their intervals."""
    head = ["workload", "share", "policy", *FIGURES]
    rows = [
        [workload, f"{part:g}", policy, *campaign.medians(list(seeds.values())).values()]
        for (workload, part), cell in cells.items()
        for policy, seeds in cell.items()
    ]
    print_table(head, rows)
    print()
    lines = []
    for figure in ("TTFT P99", "TTFT mean", "TPOT P99", "end to end mean", "end to end P99"):
        for one, other in (("Llumnix", "INFaaS++"), (OURS, "Llumnix"), (OURS, "INFaaS++")):
            for workload, values in ratios(counted, figure, one, other).items():
                low, high = campaign.interval(values)
                middle = campaign.geometric_mean(values)
                lines.append([figure, f"{one}/{other}", workload, middle, low, high, len(values)])
    print_table(["figure", "ratio", "workload", "mean", "from", "to", "pairs"], lines)


def runs_of(given: argparse.Namespace) -> list[Run]:
    """All runs, seed by seed, so that a part of them can be compared."""
    if given.quick:
        return [
            Run("s-s", 0.9, policy, 1, 600, 4, BEST_THRESHOLD["s-s"] * (policy == "Llumnix"))
            for policy in POLICIES
        ]
    form = FORMS[given.form]
    if given.sweep:
        return [
            Run(workload, part, "Llumnix", seed, *form, threshold)
            for seed in range(1, given.seeds + 1)
            for workload in given.workloads
            for part in given.shares
            for threshold in THRESHOLDS
        ]
    cells = list(itertools.product(given.workloads, given.shares))
    seeds = range(1, min(given.seeds, FIRST_SEEDS) + 1)
    return _runs(cells, seeds, list(POLICIES), form)


def more_runs(given: argparse.Namespace, counted: Iterable[Cell]) -> list[Run]:
    """The runs of the other seeds, where INFaaS++ waits for memory."""
    seeds = range(FIRST_SEEDS + 1, given.seeds + 1)
    policies = [policy for policy in POLICIES if policy != "round robin"]
    return _runs(counted, seeds, policies, FORMS[given.form])


def _runs(
    cells: Iterable[Cell], seeds: Iterable[int], policies: Sequence[str], form: tuple[int, int]
) -> list[Run]:
    cells = list(cells)
    return [
        Run(workload, part, policy, seed, *form, BEST_THRESHOLD[workload] * (policy == "Llumnix"))
        for seed in seeds
        for workload, part in cells
        for policy in policies
    ]


def unloaded_runs(runs: Sequence[Run]) -> list[Run]:
    """A run of each workload in which nothing waits."""
    instances = runs[0].instances
    workloads = dict.fromkeys(run.workload for run in runs)
    return [Run(one, UNLOADED, "INFaaS++", 1, 1000, instances) for one in workloads]


def show_sweep(results: Sequence[Mapping[str, Any]]) -> None:
    """P99 TTFT by workload and threshold, and the best."""
    found: dict[str, dict[float, list[float]]] = {}
    for result in results:
        run = result["run"]
        by_threshold = found.setdefault(run["workload"], {})
        by_threshold.setdefault(run["threshold"], []).append(result["figures"]["TTFT P99"])
    means = {
        workload: {one: campaign.geometric_mean(values) for one, values in by.items()}
        for workload, by in found.items()
    }
    print_table(
        ["workload", *(f"{one:g}" for one in THRESHOLDS), "best"],
        [
            [workload, *by.values(), min(by, key=lambda one: by[one])]
            for workload, by in means.items()
        ],
    )


def main(arguments: list[str] | None = None) -> int:
    made = campaign.options(__doc__ or "", "llumnix_policies")
    made.add_argument("--form", choices=list(FORMS), default="development")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    made.add_argument("--shares", nargs="+", type=float, choices=SHARES, default=list(SHARES))
    made.add_argument("--sweep", action="store_true", help="sweep Llumnix's threshold instead")
    given = made.parse_args(arguments)
    runs = runs_of(given)
    if given.sweep:
        show_sweep(campaign.run_all(runs, given.runs, given.workers))
        return 0
    calm = unloaded_runs(runs)
    results = campaign.run_all([*calm, *runs], given.runs, given.workers)
    unloaded = unloaded_tails(results[: len(calm)])
    results = results[len(calm) :]
    counted = loaded(cells_of(results), unloaded)
    if not given.quick:
        results += campaign.run_all(more_runs(given, counted), given.runs, given.workers)
    cells = cells_of(results)
    counted = {key: cells[key] for key in counted}
    show(cells, counted)
    speed = median(one["times_real_time"] for one in results)
    print(f"simulated at {speed:.0f} times real time (median run, one core)")
    print(f"{len(counted)} of {len(cells)} cells wait for memory under INFaaS++")
    result = {
        "settings": SETTINGS,
        "requests": runs[0].requests,
        "instances": runs[0].instances,
        "seeds": len({one["run"]["seed"] for one in results}),
        "times_real_time": speed,
        "complete": all(one["complete"] for one in results),
        "unloaded": unloaded,
        "cells": [
            {
                "workload": workload,
                "share": part,
                "counted": (workload, part) in counted,
                "policies": {
                    policy: campaign.medians(list(seeds.values())) for policy, seeds in cell.items()
                },
            }
            for (workload, part), cell in cells.items()
        ],
    }
    return finish(result, targets_of(cells, counted), given.json)


if __name__ == "__main__":
    sys.exit(main())
