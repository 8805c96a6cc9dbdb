"""How many requests per second does an instance serve well, by the roles of instances?

DistServe's measure (OSDI '24, section 6): the highest rate at which nine of ten requests have
their first token, and each further one, in the time that is wanted. Simulated: four instances
of Llama 3 8B on an A10 each; lengths of chat, of code completion and of summarisation; Poisson
arrivals. The same workloads are served by

mixed
    instances that do everything: prompts in chunks, as large as the batch's target bears;
NP+MD
    N instances that compute prompts, and hand each request on to one of M that go on with it;
changing
    as many of each at first, which change with the load (--change-roles).

A time wanted is a multiple of what an idle instance takes: to the first token three times that
of a prompt longer than nine of ten of the workload, per token two and a half steps. Both are
scaled together. The rate is found by bisection. Requests of the first part of a run, in which the
cluster fills and roles find their split, do not count.

    python -m bench.goodput [--quick] [--json PATH] [--runs FOLDER] [--seconds S] [--workers N]
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench import campaign
from bench.report import Target, finish, percentile, print_table
from cluster.dispatcher.core import DispatcherConfig
from cluster.dispatcher.roles import RolesConfig
from cluster.dispatcher.scaling import instance_name
from cluster.simulation.profile_files import load_profile
from cluster.simulation.records import RequestRecord
from cluster.simulation.results import stages
from cluster.simulation.simulation import Simulation
from cluster.simulation.workloads.records import WorkloadRequest
from cluster.simulation.workloads.sources import load_workload
from instance.load import Role

SETTINGS: dict[str, Any] = {
    "profile": "llama-8b-a10",
    "max_num_seqs": 256,
    "max_num_batched_tokens": 2048,
    "migration_bytes_per_second": 0.0,
    "kv_tokens": 32_000,
    "max_tokens": 4096,
    "max_len": 8000,
    "instances": 4,
    "first_steps": 3.0,
    "further_steps": 2.5,
    "share": 0.9,
    "precision": 0.1,
    "warm_up": 0.4,
    "window": 10.0,
    "cooldown": 2.0,
}
"""``first_steps``, ``further_steps``: times wanted over those of an idle instance;
``precision``: share by which the rate found may be too low; ``warm_up``: share of a run that does
not count; ``window``, ``cooldown``: of roles that change, shorter than usual as the runs are."""
WORKLOADS = {
    "chat": "lengths_sharegpt_firstturn.csv.gz",
    "code": "azure2023_code_0-2400s.csv.gz",
    "summaries": "lengths_arxiv_summarization.csv.gz",
}
"""Tables of prompt and output lengths."""
MIXED, CHANGING = "mixed", "changing"
FIXED = {"1P+3D": 1, "2P+2D": 2, "3P+1D": 3}
SYSTEMS = (MIXED, *FIXED, CHANGING)
FEW = (MIXED, CHANGING)
"""Those whose times wanted are scaled."""
SCALES = (0.5, 1.0, 2.0)
"""Of the times wanted."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Seconds that are wanted to the first token and per further one."""

    ttft: float
    tpot: float

    def meets(self, one: RequestRecord) -> bool:
        """Whether a request had both."""
        if one.status != "finished":
            return False
        further = len(one.times) - 1
        return one.times[0] - one.arrival <= self.ttft and (
            further < 1 or (one.times[-1] - one.times[0]) / further <= self.tpot
        )


def workload(name: str, rate: float, requests: int, seed: int) -> list[WorkloadRequest]:
    """Requests of a workload, at ``rate`` per second."""
    path = campaign.traces() / WORKLOADS[name]
    text = f"lengths:{path}?rate={rate}&requests={requests}&max-len={SETTINGS['max_len']}"
    return load_workload(text, seed)


@functools.cache
def wanted(name: str, scale: float) -> Wanted:
    """The times wanted of a workload."""
    step = load_profile(SETTINGS["profile"]).step
    prompts = [one.prompt_tokens for one in workload(name, 1.0, 4000, 0)]
    long = round(percentile(prompts, 90))
    alone = step.of(long, long * (long + 1) // 2, 0, 0)
    idle = step.of(0, 0, 1, long)
    return Wanted(scale * SETTINGS["first_steps"] * alone, scale * SETTINGS["further_steps"] * idle)


def highest(serves: Callable[[float], bool], first: float, precision: float) -> float:
    """The highest rate that is served, by bisection; 0 if none down to a 64th of ``first``.

    Args:
        serves: Whether a rate is served; of a higher rate no more is than of a lower one.
        first: The rate to begin with.
        precision: Share by which the answer may be too low.
    """
    low = high = first
    if serves(first):
        while serves(high := 2.0 * low):
            low = high
    else:
        while not serves(low := high / 2.0):
            high = low
            if low < first / 64:
                return 0.0
    while high - low > precision * low:
        middle = math.sqrt(low * high)
        if serves(middle):
            low = middle
        else:
            high = middle
    return low


@dataclass(frozen=True, slots=True)
class Run:
    """One bisection.

    Attributes:
        system: Of ``SYSTEMS``.
        workload: Of ``WORKLOADS``.
        scale: Of the times wanted.
        seconds: In which requests come.
    """

    system: str
    workload: str
    scale: float
    seed: int
    seconds: float

    @property
    def file_name(self) -> str:
        """Tells the run from all others, and from the same under other settings."""
        words = self.workload, self.system, self.scale, self.seed, self.seconds
        return campaign.file_name(words, SETTINGS, self)

    def serve(self, rate: float) -> list[RequestRecord]:
        """What becomes of the requests that count at ``rate`` per second and instance."""
        target = wanted(self.workload, self.scale)
        count: int = SETTINGS["instances"]
        prompts = FIXED.get(self.system, count // 2)
        roles = [Role.PREFILL] * prompts + [Role.DECODE] * (count - prompts)
        scenario = campaign.scenario(
            SETTINGS,
            count,
            DispatcherConfig(
                roles=()
                if self.system == MIXED
                else tuple((instance_name(at), role) for at, role in enumerate(roles)),
                role_changes=RolesConfig(
                    self.system == CHANGING,
                    target.ttft,
                    target.tpot,
                    SETTINGS["window"],
                    SETTINGS["cooldown"],
                ),
            ),
            self.seed,
        )
        engine = scenario.engine
        scheduler = dataclasses.replace(engine.scheduler, tpot_targets=(target.tpot,) * 3)
        scenario = dataclasses.replace(
            scenario, engine=dataclasses.replace(engine, scheduler=scheduler)
        )
        number = max(1, round(rate * count * self.seconds))
        requests = workload(self.workload, rate * count, number, self.seed)
        records = Simulation(scenario, requests).run().requests
        return records[int(SETTINGS["warm_up"] * len(records)) :]

    def execute(self) -> dict[str, Any]:
        """The rate, and where the time of requests went at it."""
        target = wanted(self.workload, self.scale)
        served: dict[float, list[RequestRecord]] = {}

        def serves(rate: float) -> bool:
            records = self.serve(rate)
            share = sum(map(target.meets, records)) / max(1, len(records))
            if share >= SETTINGS["share"]:
                served[rate] = records
            return share >= SETTINGS["share"]

        rate = highest(serves, 2.0, SETTINGS["precision"])
        done = [one for one in served.get(rate, []) if one.status == "finished"]
        return {
            "run": dataclasses.asdict(self),
            "settings": SETTINGS,
            "wanted": dataclasses.asdict(target),
            "rate": rate,
            "stages": {name: found.get("mean", 0.0) for name, found in stages(done).items()},
        }


Cells = dict[tuple[str, float], dict[str, Mapping[str, Any]]]
"""By workload and scale: by system, the result."""


def cells_of(results: Iterable[Mapping[str, Any]]) -> Cells:
    """Results side by side."""
    cells: Cells = {}
    for result in results:
        run = result["run"]
        cells.setdefault((run["workload"], run["scale"]), {})[run["system"]] = result
    return cells


def best_fixed(cell: Mapping[str, Mapping[str, Any]]) -> float:
    """The rate of the best split that does not change."""
    return float(max(one["rate"] for system, one in cell.items() if system in FIXED))


def targets_of(cells: Cells) -> list[Target]:
    """What must hold for roles to be left to the policy."""
    plain = [cell for (_, scale), cell in cells.items() if scale == 1.0]
    ratios = [
        cell[CHANGING]["rate"] / best_fixed(cell) if best_fixed(cell) else 1.0 for cell in plain
    ]
    return [
        Target(
            "rate of roles that change over the best fixed split's, least of all workloads",
            min(ratios),
            0.9,
            at_most=False,
        )
    ]


def show(cells: Cells) -> None:
    """A row per workload, scale and system."""
    parts = ("prefill_queue", "prefill", "transfer", "decode_queue", "decode")
    rows: list[Sequence[Any]] = []
    for (name, scale), cell in cells.items():
        for system, one in cell.items():
            times = [f"{one['wanted'][key]:.3g}" for key in ("ttft", "tpot")]
            split = [one["stages"][part] for part in parts]
            rows.append([name, f"{scale:g}", *times, system, one["rate"], *split])
    head = ["workload", "scale", "TTFT", "TPOT", "instances", "requests/s each"]
    print("seconds wanted, the highest rate per instance, and mean seconds of a request at it")
    print_table([*head, *(part.replace("_", " ") for part in parts)], rows)


def runs_of(quick: bool, seconds: float) -> list[Run]:
    """All bisections."""
    if quick:
        return [Run(system, "code", 1.0, 1, 10.0) for system in (MIXED, "2P+2D", CHANGING)]
    return [
        Run(system, name, scale, 1, seconds)
        for name in WORKLOADS
        for scale in SCALES
        for system in (SYSTEMS if scale == 1.0 else FEW)
    ]


def main(arguments: list[str] | None = None) -> int:
    made = campaign.options(__doc__ or "", "goodput")
    made.add_argument("--seconds", type=float, default=50.0)
    given = made.parse_args(arguments)
    runs = runs_of(given.quick, given.seconds)
    results = campaign.run_all(runs, given.runs, given.workers)
    cells = cells_of(results)
    show(cells)
    result = {
        "settings": SETTINGS,
        "seconds": runs[0].seconds,
        "cells": [
            {"workload": name, "scale": scale, "systems": cell}
            for (name, scale), cell in cells.items()
        ],
    }
    return finish(result, targets_of(cells), given.json)


if __name__ == "__main__":
    sys.exit(main())
