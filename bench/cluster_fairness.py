"""Does service follow weights over a whole cluster, wherever requests are and go?

Simulated clusters of 1, 4 and 16 instances (a 7B model on an A10 each, room for 10,000 tokens
of KV) under loads that let tenants drift apart; see ``bench.fair_cluster_runs`` for the
systems. Looked at ten times a second: how far apart the counters of the tenants are that wait
(service by weight, with what instances have charged and not yet reported), over the bound G
that the dispatcher states. Theta is fixed, and with it the leases: theta / (instances - 1), or a
sixteenth of an increment where that is more.

overloaded
    Two tenants ask for 1.5 and 3 requests/s per instance, 256 tokens in and out.
on-off
    The same, but the first pauses half of the time.
skewed
    Eight tenants, whose demands are as 1 : 1/2 : ... : 1/8, 6 requests/s per instance in all.
arena
    The recorded demand of 27 tenants, a copy for each instance, each begun elsewhere.
moved
    As overloaded; each instance gives a random request a second away.
pinned
    As overloaded; on arrival all of the first tenant's requests are placed on one instance.

Each run leaves a file in the folder --runs, and is not repeated where that is there.

    python -m bench.cluster_fairness [--quick] [--json PATH] [--runs FOLDER] [--workers N]
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import campaign
from bench.fair_cluster_runs import DROVER, FCFS, LOOK, OWN, STILL, Setting, run
from bench.report import Target, finish, print_table
from cluster.simulation.profile_files import load_profile
from cluster.simulation.workloads.records import WorkloadRequest, by_arrival
from cluster.simulation.workloads.sources import load_workload
from instance.config import SchedulerConfig

SETTINGS: dict[str, Any] = {
    "profile": "llama-7b-a10",
    "kv_tokens": 10_000,
    "theta": 2000.0,
    "max_num_seqs": 48,
    "max_num_batched_tokens": 512,
}
SYSTEMS = {one.name: one for one in (DROVER, FCFS, OWN, STILL)}
TWO = (1.5, 3.0)
EIGHT = tuple(6.0 / 2.717857 / rank for rank in range(1, 9))
TRACE = "vtc_arena_27tenants.csv.gz"
ALONE = ("overloaded", "on-off", "skewed", "arena")
LOADS = (*ALONE, "moved", "pinned")
PINNED = "tenant-1"
SECONDS = {1: 180.0, 4: 120.0, 16: 60.0}
"""By instances."""
MANY = 16
"""With so many, only two loads are given to the systems that ours is compared with."""
SHARE = 0.1
"""By which part of it a pinned tenant's share may differ from what it is otherwise."""


def requests(load: str, instances: int, seconds: float, seed: int) -> list[WorkloadRequest]:
    """What is asked of a cluster.

    Raises:
        WorkloadError: The trace is not where DROVER_TRACES points.
    """
    if load == "arena":
        trace = load_workload(f"vtc:{campaign.traces() / TRACE}", seed)
        return rotated(trace, instances, seconds)
    name = "tenants-on-off" if load == "on-off" else "tenants-overloaded"
    rates = EIGHT if load == "skewed" else TWO
    text = ",".join(f"{rate * instances:.4f}" for rate in rates)
    pauses = "&on=30&off=30" if load == "on-off" else ""
    return load_workload(f"{name}?rates={text}&seconds={seconds:g}{pauses}", seed)


def rotated(trace: Sequence[WorkloadRequest], copies: int, seconds: float) -> list[WorkloadRequest]:
    """Copies of a trace beside each other, each begun at another point and gone round."""
    length = max(one.arrival for one in trace)
    made = []
    for number in range(copies):
        for one in trace:
            arrival = (one.arrival - number * length / copies) % length
            if arrival < seconds:
                prompt = tuple(
                    span._replace(stream=f"{span.stream}/{number}") for span in one.prompt
                )
                made.append(dataclasses.replace(one, arrival=arrival, prompt=prompt))
    return by_arrival(made)


@dataclass(frozen=True, slots=True)
class Run:
    """One simulation."""

    load: str
    instances: int
    system: str
    seconds: float
    seed: int = 0

    @property
    def file_name(self) -> str:
        words = self.load, self.instances, self.system, self.seed
        return campaign.file_name(words, SETTINGS, self)

    def execute(self) -> dict[str, Any]:
        """The figures of the run."""
        profile = load_profile(SETTINGS["profile"])
        blocks = SETTINGS["kv_tokens"] // profile.model.block_size
        setting = Setting(
            dataclasses.replace(profile, num_blocks=blocks),
            SETTINGS["theta"],
            self.seconds,
            SchedulerConfig(
                max_num_seqs=SETTINGS["max_num_seqs"],
                max_num_batched_tokens=SETTINGS["max_num_batched_tokens"],
            ),
        )
        figures = run(
            SYSTEMS[self.system],
            setting,
            self.instances,
            requests(self.load, self.instances, self.seconds, self.seed),
            pinned=PINNED if self.load == "pinned" else "",
            migrate=LOOK if self.load == "moved" else 0.0,
            seed=self.seed,
        )
        return {"run": dataclasses.asdict(self), **figures}


def runs_of(given: argparse.Namespace) -> list[Run]:
    """All runs; only what moves requests is run where they are moved at random."""
    sizes = {2: 40.0} if given.quick else SECONDS
    loads = ("overloaded", "moved", "pinned") if given.quick else LOADS
    return [
        Run(load, instances, system, seconds)
        for instances, seconds in sizes.items()
        for load in loads
        for system in SYSTEMS
        if system == DROVER.name or _compared(load, instances)
        if instances > 1 or load in ALONE
    ]


def _compared(load: str, instances: int) -> bool:
    """Whether others than ours are run too."""
    return load != "moved" and (instances < MANY or load in ("overloaded", "pinned"))


def targets_of(results: Sequence[Mapping[str, Any]]) -> list[Target]:
    """The verdict, on the worst of all runs."""
    ours = {
        (one["run"]["load"], one["run"]["instances"]): one
        for one in results
        if one["run"]["system"] == DROVER.name
    }
    shares = [
        abs(one["received"][PINNED] / ours["overloaded", instances]["received"][PINNED] - 1.0)
        for (load, instances), one in ours.items()
        if load == "pinned"
    ]
    worst = max(one["over_bound_max"] for one in ours.values())
    return [
        Target("largest gap over G, all loads", worst, 1.0),
        Target("share of a pinned tenant, off by", max(shares), SHARE),
    ]


def table(results: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """A line per run."""
    return [
        [
            one["run"]["load"],
            one["run"]["instances"],
            one["run"]["system"],
            round(one["gap_mean"]),
            round(one["gap_max"]),
            round(one["bound"]),
            f"{one['over_bound_max']:.2f}",
            f"{one['window_max']:.0f} {one['window_mean']:.0f}",
            f"{one['received'].get(PINNED, float('nan')):.3f}",
            round(one["service"]),
            one["preemptions"],
            sum(one["migrations"].values()),
        ]
        for one in results
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment, print its result, answer with the verdict."""
    given = campaign.options(__doc__ or "", "cluster_fairness").parse_args(arguments)
    results = campaign.run_all(runs_of(given), Path(given.runs), given.workers)
    print_table(
        ("load", "instances", "system", "gap mean", "max", "G", "max / G",
         "60 s difference max mean", "tenant 1", "service/s", "preempted", "moved"),
        table(results),
    )  # fmt: skip
    return finish({"settings": SETTINGS, "runs": results}, targets_of(results), given.json)


if __name__ == "__main__":
    sys.exit(main())
