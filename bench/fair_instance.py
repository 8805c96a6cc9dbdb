"""How evenly does one instance serve its tenants, and what does that cost?

The experiments of VTC (Sheng et al., OSDI '24), at its scale: a 7B model on an A10, whose
steps and copies take what the cost profile says, with room for 10,000 tokens of KV, on a
virtual clock. Each workload is served by the engine as it is, by the same engine in the order
of arrival, and by non-preemptive VTC (see ``bench.fair_runs``); on the two that the targets
are about also with a range of fixed thetas. Copies of KV are paid for.

Gap: how far apart the counters of two tenants are at most while both wait. Accumulated
difference: of the service that two tenants received while both waited. Service: prompt tokens,
and twice the output tokens, by the tenant's weight.

    python -m bench.fair_instance [--quick] [--json PATH] [--seeds N]
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.fair_runs import DROVER, FCFS, FCFS_RESERVED, VTC, Run, System, at_theta
from bench.report import Target, finish, median, parser, print_table
from cluster.simulation.profile_files import load_profile
from cluster.simulation.workloads.sources import load_workload

PROFILE = "llama-7b-a10"
KV_TOKENS = 10_000
SECONDS = 600.0
SYSTEMS = (DROVER, FCFS, VTC, FCFS_RESERVED)
THETAS = (0.0, 128.0, 512.0, 2048.0, 8192.0, math.inf)
ROOT = Path(__file__).resolve().parent.parent
TRACE = "vtc_arena_27tenants.csv.gz"


@dataclass(frozen=True, slots=True)
class Load:
    """A workload.

    Attributes:
        name: Of the workload.
        text: How ``load_workload`` knows it, without its length.
        weights: By tenant; 1 where there is none.
        allowed: Share of VTC's gap that the target allows; None where there is no target.
    """

    name: str
    text: str
    weights: dict[str, float] = field(default_factory=dict)
    allowed: float | None = None


OVERLOADED = "tenants-overloaded?rates=1.5,3&seconds={seconds:g}"
LOADS = (
    Load("256/256", OVERLOADED, allowed=0.1),
    Load("64/1024", OVERLOADED + "&prompt=64&output=1024", allowed=0.2),
    Load("proportional", "tenants-proportional?rates=0.25,0.5,1.5&seconds={seconds:g}"),
    Load("on-off", "tenants-on-off?rates=0.5,3&seconds={seconds:g}"),
    Load(
        "weights 1:2:3:4",
        "tenants-overloaded?rates=1,1,1,1&seconds={seconds:g}",
        {f"tenant-{number}": float(number) for number in (1, 2, 3, 4)},
    ),
    Load("arena, 27 tenants", "vtc:{traces}/" + TRACE),
)


def serve(load: Load, system: System, seed: int, seconds: float) -> dict[str, Any]:
    """One run.

    Raises:
        WorkloadError: if the trace is not where DROVER_TRACES points.
    """
    traces = os.environ.get("DROVER_TRACES") or ROOT.parent / "shared" / "traces"
    workload = load_workload(load.text.format(seconds=seconds, traces=traces), seed)
    full = load_profile(PROFILE)
    profile = dataclasses.replace(full, num_blocks=KV_TOKENS // full.model.block_size)
    return Run(system, profile, workload, load.weights, seed).result(seconds)


def run(options: argparse.Namespace) -> dict[str, Any]:
    seconds = 120.0 if options.quick else SECONDS
    seeds = 1 if options.quick else options.seeds
    rows = []
    for load in LOADS:
        curve = [at_theta(theta) for theta in THETAS] if load.allowed is not None else []
        # The trace is as it was recorded: another seed changes nothing.
        repeats = 1 if load.text.startswith("vtc:") else seeds
        for system in (*SYSTEMS, *curve):
            runs = [serve(load, system, seed, seconds) for seed in range(repeats)]
            rows.append({"load": load.name, "system": system.name, "runs": runs})
            print(f"{load.name:18} {system.name}", file=sys.stderr, flush=True)
    return {"profile": PROFILE, "kv_tokens": KV_TOKENS, "seconds": seconds, "rows": rows}


def targets(rows: Sequence[dict[str, Any]]) -> list[Target]:
    """The verdict: a largest gap is that of all seeds."""
    of = {(row["load"], row["system"]): row["runs"] for row in rows}

    def gap(load: str, system: System) -> float:
        return max(float(one["gap"]) for one in of[load, system.name])

    def rate(load: str, system: System) -> float:
        return median(one["service"] for one in of[load, system.name])

    found = []
    for load in LOADS:
        if load.allowed is None:
            continue
        name = load.name
        share = gap(name, DROVER) / gap(name, VTC)
        found.append(Target(f"{name}, largest gap over VTC's", share, load.allowed))
        ratio = rate(name, DROVER) / rate(name, FCFS)
        found.append(Target(f"{name}, service over FCFS's", ratio, 0.95, at_most=False))
    return found


def table(rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """A line for each workload and system: medians over the seeds, but for the gaps."""
    lines = []
    for row in rows:
        runs = row["runs"]

        def middle(key: str, scale: float = 1.0, runs: list[Any] = runs) -> int:
            return round(median(one[key] for one in runs) / scale)

        small = [f"{median(one['small_ttft'][at] for one in runs):.1f}" for at in (0, 1)]
        even = [min(one["received"].values()) / max(one["received"].values()) for one in runs]
        lines.append(
            [
                row["load"],
                row["system"],
                " ".join(f"{one['gap']:.0f}" for one in runs),
                max(one["bound"] for one in runs),
                round(max(one["spread"] for one in runs)),
                f"{middle('window_max')} {middle('window_mean')}",
                " ".join(small),
                f"{median(even):.2f}",
                middle("service"),
                middle("tokens"),
                round(median(sum(one["preemptions"].values()) for one in runs)),
                middle("swapped_bytes", 1e9),
            ]
        )
    return lines


def main() -> int:
    """Run the experiment, print its result, answer with the verdict."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--seeds", type=int, default=5, help="workloads drawn of each kind")
    options = arguments.parse_args()
    result = run(options)
    print_table(
        ("workload", "system", "gap by seed", "bound", "accumulated", "60 s difference max mean",
         "small TTFT mean p99 s", "least/most", "service/s", "tokens/s", "preempted", "GB swapped"),
        table(result["rows"]),
    )  # fmt: skip
    return finish(result, targets(result["rows"]), options.json)


if __name__ == "__main__":
    sys.exit(main())
