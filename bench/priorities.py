"""What does the class `interactive` bring, and what does it cost the others?

Llumnix's experiment of priorities (OSDI '24, section 6.4), simulated: 16 instances of LLaMA-7B
on an A10 each, short prompts and outputs, bursty arrivals (Gamma intervals with a coefficient
of variation from 2 to 8), and one request of ten is of high priority, at the published rate.
Answers live for minutes, so that a run is long: 10,000 requests. The same workload runs

blind
    with every request in one class: what Llumnix-base is to Llumnix;
by order
    with the high ones `interactive`: they are admitted first, and preempt others;
with headroom
    and memory kept free besides on instances that run one, so that they decode in small
    batches (the paper's artifact leaves 1,600 tokens to be used; here it is a third of the KV,
    and "with less headroom" a little more). The verdict is on this side.

Better and worse are ratios of the same requests' times, blind over with classes for the high
ones, with classes over blind for the normal ones: geometric means over rates, burstiness and
seeds.

    python -m bench.priorities [--quick] [--json PATH] [--runs FOLDER] [--rates R ...]
        [--requests N] [--seeds N] [--workers N]
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench import campaign
from bench.report import Target, finish, print_table
from cluster.dispatcher.core import DispatcherConfig
from cluster.dispatcher.load import LoadConfig
from cluster.simulation.results import latencies
from cluster.simulation.simulation import Simulation
from cluster.simulation.workloads.records import WorkloadRequest
from cluster.simulation.workloads.sources import load_workload
from cluster.simulation.workloads.transform import with_class
from instance.request import RequestClass

SETTINGS = {**campaign.TESTBED, "instances": 16, "high": 0.1}
RATES = (26.0,)
"""Requests per second."""
BURSTINESS = (2.0, 4.0, 6.0, 8.0)
BLIND, ORDER, HEADROOM = "blind", "by order", "with headroom"
IN_USE = {BLIND: None, ORDER: None, HEADROOM: 4160, "with less headroom": 4800}
"""Tokens that an instance with a high request shall hold at most; None for any number."""
SIDES = tuple(IN_USE)
BLOCK = 16
"""Tokens of a KV block of the profile."""
HIGH, NORMAL = "high", "normal"
FIGURES = {
    "end to end mean": ("e2e", "mean"),
    "TTFT mean": ("ttft", "mean"),
    "TTFT P99": ("ttft", "p99"),
    "TPOT mean": ("tpot", "mean"),
    "TPOT P99": ("tpot", "p99"),
}


@dataclass(frozen=True, slots=True)
class Run:
    """One simulation.

    Attributes:
        side: Of ``SIDES``.
        burstiness: Coefficient of variation of the intervals between arrivals.
        rate: Requests per second.
    """

    side: str
    burstiness: float
    rate: float
    seed: int
    requests: int
    instances: int

    @property
    def file_name(self) -> str:
        """Tells the run from all others, and from the same under other settings."""
        words = self.side, self.rate, self.burstiness, self.seed, self.requests
        return campaign.file_name(words, {**SETTINGS, "in_use": IN_USE[self.side]}, self)

    def workload(self) -> list[WorkloadRequest]:
        """The same requests, and the same ones in group "high", whatever the side."""
        text = f"llumnix-s-s?rate={self.rate}&cv={self.burstiness}&requests={self.requests}"
        kind = RequestClass.STANDARD if self.side == BLIND else RequestClass.INTERACTIVE
        return with_class(load_workload(text, self.seed), SETTINGS["high"], kind, HIGH, self.seed)

    def execute(self) -> dict[str, Any]:
        """The figures of the run, of high and normal requests apart."""
        in_use = IN_USE[self.side]
        free = 0 if in_use is None else (SETTINGS["kv_tokens"] - in_use) // BLOCK
        scenario = campaign.scenario(
            SETTINGS,
            self.instances,
            DispatcherConfig(load=LoadConfig(headroom_blocks=free)),
            self.seed,
        )
        outcome = Simulation(scenario, self.workload()).run()
        done = [one for one in outcome.requests if one.status == "finished"]
        parts = {
            HIGH: latencies([one for one in done if one.group == HIGH]),
            NORMAL: latencies([one for one in done if one.group != HIGH]),
        }
        return {
            "run": dataclasses.asdict(self),
            "settings": SETTINGS,
            "figures": {
                part: {name: campaign.found(times, path) for name, path in FIGURES.items()}
                for part, times in parts.items()
            },
            "finished": len(done),
            "preemptions": sum(one.preemptions for one in done),
            "complete": outcome.complete,
        }


Cells = dict[tuple[float, float, int], dict[str, dict[str, dict[str, float]]]]
"""By rate, burstiness and seed: by side, then part, the figures."""


def cells_of(results: Iterable[Mapping[str, Any]]) -> Cells:
    """Results side by side."""
    cells: Cells = {}
    for result in results:
        run = result["run"]
        key = run["rate"], run["burstiness"], run["seed"]
        cells.setdefault(key, {})[run["side"]] = result["figures"]
    return cells


def ratios(
    cells: Cells,
    side: str,
    part: str,
    figure: str,
    rate: float | None = None,
    burstiness: float | None = None,
) -> list[float]:
    """A side's time over the blind one's, for each pair of runs of one workload."""
    return [
        cell[side][part][figure] / cell[BLIND][part][figure]
        for (at, of, _), cell in cells.items()
        if rate in (None, at) and burstiness in (None, of) and side in cell
    ]


def targets_of(cells: Cells) -> list[Target]:
    """What the class must bring, and may cost, as in the paper."""

    def of(part: str, figure: str) -> float:
        return campaign.geometric_mean(ratios(cells, HEADROOM, part, figure))

    return [
        Target("mean end to end of the high, times better", 1 / of(HIGH, "end to end mean"), 1.2,
               at_most=False),
        Target("mean end to end of the normal over blind", of(NORMAL, "end to end mean"), 1.045),
    ]  # fmt: skip


def show(cells: Cells) -> None:
    """A row per rate, burstiness and side, and over all: ratios to blind, with intervals."""
    every: list[tuple[float | None, float | None]] = []
    for given in sorted({at for at, _, _ in cells}):
        every += [(given, one) for one in sorted({one for at, one, _ in cells if at == given})]
        every.append((given, None))
    rows: list[Sequence[Any]] = []
    for rate, burstiness in (*every, (None, None)):
        for side in SIDES[1:]:
            for part in (HIGH, NORMAL):
                labels = ["all" if one is None else f"{one:g}" for one in (rate, burstiness)]
                found = [ratios(cells, side, part, name, rate, burstiness) for name in FIGURES]
                if not found[0]:
                    continue
                low, high = campaign.interval(found[0])
                means = [campaign.geometric_mean(one) for one in found]
                rows.append([*labels, side, part, means[0], f"{low:.3f}-{high:.3f}", *means[1:]])
    names = list(FIGURES)
    print("times over those of the blind run; the interval is of the first, at 95 %")
    print_table(["rate", "CV", "side", "requests", names[0], "interval", *names[1:]], rows)


def runs_of(quick: bool, rates: Sequence[float], requests: int, seeds: int) -> list[Run]:
    """All runs, workload by workload."""
    if quick:
        # A quarter of the cluster under a quarter of the load.
        return [Run(side, 4.0, rates[0] / 4, 1, 500, SETTINGS["instances"] // 4) for side in SIDES]
    return [
        Run(side, burstiness, rate, seed, requests, SETTINGS["instances"])
        for rate in rates
        for burstiness in BURSTINESS
        for seed in range(1, seeds + 1)
        for side in SIDES
        # What the order alone does, does not depend on the rate much.
        if side != ORDER or rate == rates[0]
    ]


def main(arguments: list[str] | None = None) -> int:
    made = campaign.options(__doc__ or "", "priorities")
    made.add_argument("--rates", type=float, nargs="+", default=RATES)
    made.add_argument("--requests", type=int, default=10_000)
    made.add_argument("--seeds", type=int, default=6)
    given = made.parse_args(arguments)
    runs = runs_of(given.quick, given.rates, given.requests, given.seeds)
    results = campaign.run_all(runs, given.runs, given.workers)
    cells = cells_of(results)
    show(cells)
    result = {
        "settings": SETTINGS,
        "rates": list(given.rates),
        "requests": runs[0].requests,
        "complete": all(one["complete"] for one in results),
        "cells": [
            {"rate": rate, "burstiness": burstiness, "seed": seed, "sides": cell}
            for (rate, burstiness, seed), cell in cells.items()
        ],
    }
    return finish(result, targets_of(cells), given.json)


if __name__ == "__main__":
    sys.exit(main())
