"""What does it cost to switch between sequences that do not fit the KV pool together?

FastSwitch's experiment (arXiv 2411.18424) at our scale: conversations whose priorities change
every 25 steps, a pool too small for all that are asked at once, and six systems that differ
only in how KV leaves and returns (``bench.switch_systems``). Two parts:

modelled
    The engine on a virtual clock: Llama 3 8B on a 24 GB GPU behind PCIe 4.0, the cost
    profile llama-8b-a10, whose parameters carry their published sources. Targets are
    relative to the first system, with random priorities; of the Markov pattern the paper's
    law is not known to us, so it has no target. A second table halves and doubles every
    parameter.
cpu
    The engine with a real model, whose kernels compute a row alike whatever the batch: every
    system must give every conversation the same answers. No target on time: memory here is
    so fast beside prefill that swapping always wins.

Each run leaves a file in --runs and is not repeated where that is there already.

    python -m bench.context_switch [--quick] [--json PATH] [--runs FOLDER] [--workers N]
        [--seeds N] [--part modelled|cpu|all]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from bench import campaign
from bench.report import Target, finish, median, print_table
from bench.switch_load import INTERVAL, LEVELS, PATTERNS, SPREAD, STAY
from bench.switch_runs import Load, run_modelled
from bench.switch_systems import (
    BLOCKWISE,
    BY_NAME,
    FIRST,
    GROUPED,
    OWN,
    PLAIN,
    SYSTEMS,
    WHOLE,
)
from cluster.simulation.profile import CostProfile
from cluster.simulation.profile_files import load_profile

PROFILE = "llama-8b-a10"
CPU_BLOCKS, QUICK_BLOCKS = 40, 16
"""Pools of the CPU runs: a little more than the longest conversation."""
LOAD = Load(sessions=100)
CPU_LOAD = Load(sessions=12, rate=20.0, scale=1 / 16, max_len=512)
VARIED_SEEDS = 2
"""Of the sensitivity table: it has two runs a seed for each of its rows."""

SETTINGS = {"interval": INTERVAL, "stay": STAY, "spread": SPREAD, "theta": 0.0}
"""Of all runs."""

LATENCIES = [f"{name}_p{level:g}" for name in ("ttft", "tbt") for level in LEVELS]

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one system; a task for a process.

    Attributes:
        system: Its name.
        pattern: Of the priorities.
        seed: Of everything that is drawn.
        load: What is asked.
        profile: What it runs on; None: this machine, with ``model``.
        model, num_blocks: Of a CPU run.
    """

    system: str
    pattern: str
    seed: int
    load: Load
    profile: CostProfile | None
    model: str = ""
    num_blocks: int = 0

    @property
    def file_name(self) -> str:
        """Differs where anything that the outcome depends on does."""
        runs_on = {} if self.profile is None else parameters(self.profile)
        words = self.system, self.pattern, self.seed
        told = dataclasses.replace(self, profile=None)
        return campaign.file_name(words, {**SETTINGS, **runs_on}, told)

    def execute(self) -> Result:
        """Do it."""
        system = BY_NAME[self.system]
        if self.profile is not None:
            return run_modelled(system, self.profile, self.load, self.pattern, self.seed)
        from bench.switch_cpu import run_cpu  # the modelled part needs no torch

        return run_cpu(system, self.model, self.num_blocks, self.load, self.pattern, self.seed)


def execute(runs: Sequence[Run], folder: Path, workers: int) -> dict[str, Result]:
    """Results by file name."""
    named = {run.file_name: run for run in runs}
    return dict(zip(named, campaign.run_all(named.values(), folder, workers), strict=True))


# ---- parameters


def parameters(profile: CostProfile) -> dict[str, float]:
    """The parameters of the model by name. Copies cost the same both ways."""
    step = {f"step.{key}": value for key, value in dataclasses.asdict(profile.step).items()}
    return {
        **step,
        "copy.bandwidth": profile.copy_out.bandwidth,
        "copy.launch": profile.copy_out.launch,
        "num_blocks": profile.num_blocks,
        "num_host_blocks": profile.num_host_blocks,
    }


def changed(profile: CostProfile, name: str, factor: float) -> CostProfile:
    """The profile with one of its ``parameters`` multiplied."""
    part, _, key = name.partition(".")
    if not key:
        return dataclasses.replace(profile, **{part: round(getattr(profile, part) * factor)})
    if part == "step":
        value = getattr(profile.step, key) * factor
        return dataclasses.replace(profile, step=dataclasses.replace(profile.step, **{key: value}))
    copies = dataclasses.replace(profile.copy_out, **{key: getattr(profile.copy_out, key) * factor})
    return dataclasses.replace(profile, copy_out=copies, copy_in=copies)


# ---- figures


def per_swap(figures: Result) -> float:
    """Copies that the KV of a sequence took, one way; nan if there was none."""
    swaps = figures["swaps"]
    return figures["copies"] / swaps if swaps else float("nan")


METRICS: dict[str, Callable[[Result], float]] = {
    **{name: itemgetter(name) for name in LATENCIES},
    "tokens_per_second": itemgetter("tokens_per_second"),
    "tokens_per_second_in_all": itemgetter("tokens_per_second_in_all"),
    "occupancy": itemgetter("occupancy"),
    "preemptions_per_turn": itemgetter("preemptions_per_turn"),
    "copies_per_swap": lambda one: per_swap(one["swaps"]),
    "copies_per_swap_full": lambda one: per_swap(one["swaps_full"]),
    "gigabytes_out": lambda one: one["bytes_out"] / 1e9,
    "gigabytes_in": lambda one: one["bytes_in"] / 1e9,
    "stall_seconds": itemgetter("stall_seconds"),
    "computed": itemgetter("computed"),
    "computed_again": itemgetter("computed_again"),
}
"""What is told of a run: times in seconds, ``computed`` in tokens of prompts."""

RATIOS: dict[str, Callable[[Result, Result], float]] = {
    "ttft_p95": lambda first, other: first["ttft_p95"] / other["ttft_p95"],
    "ttft_p99": lambda first, other: first["ttft_p99"] / other["ttft_p99"],
    "tbt_p99.9": lambda first, other: first["tbt_p99.9"] / other["tbt_p99.9"],
    "throughput": lambda first, other: other["tokens_per_second"] / first["tokens_per_second"],
}
"""By how much a system is better than the first one, of the same seed."""
BOUNDS = {"ttft_p95": 4.0, "ttft_p99": 4.0, "tbt_p99.9": 2.0, "throughput": 1.3}


def ratios(pairs: Iterable[tuple[Result, Result]]) -> dict[str, list[float]]:
    """Each of ``RATIOS``, by seed."""
    found = list(pairs)
    return {name: [of(*pair) for pair in found] for name, of in RATIOS.items()}


def summary(by_seed: dict[str, list[Result]]) -> list[Result]:
    """A row for each system: medians over seeds, and ratios to the first system."""
    rows = []
    for name, results in by_seed.items():
        better = ratios(zip(by_seed[FIRST], results, strict=True))
        rows.append(
            {
                "system": name,
                **{key: median(of(one) for one in results) for key, of in METRICS.items()},
                "better": {key: median(values) for key, values in better.items()},
                "better_by_seed": better,
                "turns": sum(one["turns"] for one in results),
            }
        )
    return rows


def holds(better: dict[str, float]) -> bool:
    """All four ratios reach their bounds."""
    return all(better[name] >= bound for name, bound in BOUNDS.items())


def sensitivity(
    profile: CostProfile,
    found: dict[str, Result],
    pattern: str,
    seeds: Sequence[int],
    load: Load,
) -> list[Result]:
    """A row for the profile as it is, and one for each parameter halved and doubled."""
    rows = []
    for name, factor, varied in variants(profile):
        first, whole = (
            [found[Run(system, pattern, seed, load, varied).file_name] for seed in seeds]
            for system in (FIRST, WHOLE)
        )
        better = {
            key: median(values) for key, values in ratios(zip(first, whole, strict=True)).items()
        }
        rows.append({"parameter": name, "factor": factor, "better": better, "holds": holds(better)})
    return rows


def variants(profile: CostProfile) -> list[tuple[str, float, CostProfile]]:
    """(parameter, factor, profile): as it is, then each parameter halved and doubled."""
    return [("", 1.0, profile)] + [
        (name, factor, changed(profile, name, factor))
        for name in parameters(profile)
        for factor in (0.5, 2.0)
    ]


# ---- parts


def modelled(options: argparse.Namespace, folder: Path) -> tuple[Result, list[Target]]:
    """The modelled part: its result and its targets."""
    profile = load_profile(PROFILE)
    load = dataclasses.replace(LOAD, sessions=40) if options.quick else LOAD
    seeds = range(1 if options.quick else options.seeds)
    patterns = PATTERNS[:1] if options.quick else PATTERNS
    varied_seeds = range(0 if options.quick else min(options.seeds, VARIED_SEEDS))
    varied_runs = [
        Run(system, patterns[0], seed, load, varied)
        for seed in varied_seeds
        for _, _, varied in variants(profile)
        for system in (FIRST, WHOLE)
    ]
    # What the engine does by itself does not depend on the pattern.
    compared = {
        pattern: (*SYSTEMS, OWN) if pattern == patterns[0] else SYSTEMS for pattern in patterns
    }
    first, *others = (
        [Run(system.name, pattern, seed, load, profile) for seed in seeds for system in systems]
        for pattern, systems in compared.items()
    )
    runs = [*first, *varied_runs, *itertools.chain(*others)]
    found = execute(runs, folder, options.workers)
    result: Result = {
        "profile": profile.name,
        "parameters": parameters(profile),
        "sources": dict(profile.sources),
        "load": dataclasses.asdict(load),
        "priority_interval": INTERVAL,
        "markov_stay": STAY,
        "seeds": len(seeds),
        "patterns": {},
        "varied_seeds": len(varied_seeds),
        "sensitivity": [],
    }
    targets = []
    for pattern in patterns:
        by_system = {
            system.name: [
                found[Run(system.name, pattern, seed, load, profile).file_name] for seed in seeds
            ]
            for system in compared[pattern]
        }
        rows = summary(by_system)
        result["patterns"][pattern] = rows
        print(f"\nmodelled, {pattern} priorities, medians of {len(seeds)} seeds")
        print_systems(rows)
        if pattern == patterns[0]:
            targets += verdict(rows)
    if varied_seeds:
        table = sensitivity(profile, found, patterns[0], varied_seeds, load)
        result["sensitivity"] = table
        print(f"\n{WHOLE} over {FIRST}, {patterns[0]} priorities, {len(varied_seeds)} seeds")
        print_table(
            ("parameter", "factor", *RATIOS, "holds"),
            [
                (row["parameter"] or "none", row["factor"], *row["better"].values(),
                 "yes" if row["holds"] else "no")
                for row in table
            ],
        )  # fmt: skip
        short = sum(1 for row in table if not row["holds"])
        targets.append(Target("rows of the sensitivity table that fall short", short, 1))
    return result, targets


def verdict(rows: Sequence[Result]) -> list[Target]:
    """What must hold at the modelled scale."""
    of = {row["system"]: row for row in rows}
    better = of[WHOLE]["better"]
    copies = of[BLOCKWISE]["copies_per_swap_full"] / of[GROUPED]["copies_per_swap_full"]
    kept = of[WHOLE]["gigabytes_out"] / of[PLAIN]["gigabytes_out"]
    return [
        *(
            Target(f"{name}, {WHOLE} over {FIRST}", better[name], bound, at_most=False)
            for name, bound in BOUNDS.items()
        ),
        Target(f"copies per swap in a full pool, {BLOCKWISE} over {GROUPED}", copies, 10, False),
        Target(f"bytes out, {WHOLE} of {PLAIN}", kept, 0.5),
    ]


def print_systems(rows: Sequence[Result]) -> None:
    """Two tables: latencies, and what the copies were."""
    print_table(
        ("system", *LATENCIES, "tok/s", "ttft p95 x", "p99 x", "tbt p99.9 x", "tok/s x"),
        [
            (row["system"], *(row[name] for name in LATENCIES), row["tokens_per_second"],
             *row["better"].values())
            for row in rows
        ],
    )  # fmt: skip
    figures = (
        *("copies_per_swap", "copies_per_swap_full", "gigabytes_out", "gigabytes_in"),
        *("stall_seconds", "computed", "computed_again", "preemptions_per_turn", "occupancy"),
        *("tokens_per_second_in_all",),
    )
    print_table(
        ("system", *figures), [(row["system"], *(row[name] for name in figures)) for row in rows]
    )


def cpu(options: argparse.Namespace, folder: Path) -> tuple[Result, list[Target]]:
    """The part with a real model: its result and whether all systems answer alike."""
    load, blocks = CPU_LOAD, CPU_BLOCKS
    if options.quick:
        load, blocks = dataclasses.replace(load, sessions=4, max_len=160), QUICK_BLOCKS
    pattern, seeds = PATTERNS[0], range(1 if options.quick else options.seeds)
    systems = (FIRST, WHOLE) if options.quick else tuple(system.name for system in SYSTEMS)
    runs = [
        Run(system, pattern, seed, load, None, options.model, blocks)
        for seed in seeds
        for system in systems
    ]
    found = execute(runs, folder, 1)
    by_system = {
        system: [found[run.file_name] for run in runs if run.system == system] for system in systems
    }
    rows = summary(by_system)
    differing = sum(
        one["answers"] != first["answers"]
        for results in by_system.values()
        for one, first in zip(results, by_system[FIRST], strict=True)
    )
    print(f"\ncpu, {options.model}, {pattern} priorities, medians of {len(seeds)} seeds")
    print_systems(rows)
    result = {
        "model": options.model,
        "blocks": blocks,
        "load": dataclasses.asdict(load),
        "seeds": len(seeds),
        "rows": rows,
        "runs_with_other_answers": differing,
    }
    return result, [Target("cpu: runs whose answers differ from the first system's", differing, 0)]


def main() -> int:
    """Run the experiment, print its result, answer with the verdict."""
    arguments = campaign.options(__doc__ or "", "context_switch")
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--part", choices=("modelled", "cpu", "all"), default="all")
    arguments.add_argument("--model", default="smollm2", help="of the CPU part")
    options = arguments.parse_args()
    parts = {"modelled": modelled, "cpu": cpu}
    result: Result = {}
    targets: list[Target] = []
    for name, part in parts.items():
        if options.part in (name, "all"):
            result[name], found = part(options, options.runs)
            targets += found
    return finish(result, targets, options.json)


if __name__ == "__main__":
    sys.exit(main())
