"""Does the simulator show what a real cluster does?

A real cluster (``drover serve``, two instances of one thread) is measured from outside by
``drover calibrate --url``: streams of equal lengths, all instances alike, and a mixed load. Then
another workload, of mixed lengths at random times, is replayed on it several times, and simulated
by the code of ``drover simulate`` under the same settings. The cluster is calibrated before and
after, since a shared machine is not as fast now as in five minutes, and there are as many
simulations with either profile as real runs. Each run, real or simulated, has words of its own,
and a simulated one slow and fast spells of its own.

Means must agree within 10 %, and 99th percentiles within 15 %, or within what the real runs
differ by among themselves where that is more: the median of one kind's runs with the other's.

Each run leaves a file in the folder --runs, and is not repeated where that is there.

    python -m bench.simulation_fidelity [--quick] [--json PATH] [--runs FOLDER] [--real N]
        [--at-most N] [--modelled]
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bench import campaign, served_cluster
from bench.report import Target, finish, median, print_table
from cluster.admin_client import AdminClient
from cluster.replay.results import summarize
from cluster.simulation import results as simulated_results
from cluster.simulation.profile_files import format_profile, load_profile
from cluster.simulation.remote_calibration import calibrate_cluster
from cluster.simulation.settings import SimulateConfig, make_plan
from cluster.simulation.simulation import Simulation
from cluster.simulation.workloads.sources import load_workload

MODEL = "smollm2"
INSTANCES = 2
SETTINGS = {
    "threads": "1",
    "max-model-len": "2048",
    "dtype": "bfloat16",
    "num-gpu-blocks-override": "2912",
}
LIKE = "llama-8b-a10"
"""Where the profile has what shows from inside only; this workload needs none of it."""
WORKLOAD = "fixed?rate=1.5&requests=90&prompt=16-320&output=16-96"
QUICK_WORKLOAD = "fixed?rate=1.5&requests=15&prompt=16-160&output=8-32"
SEED = 1
MEAN, P99 = 0.10, 0.15
"""By which part of the real figure the simulated one may be off."""
FIGURES = {
    "TTFT mean": ("mean_ttft_ms", ("latency", "ttft", "mean"), 1000.0),
    "TPOT mean": ("mean_tpot_ms", ("latency", "tpot", "mean"), 1000.0),
    "tokens/s": ("total_token_throughput", ("throughput", "tokens_per_second"), 1.0),
    "TTFT P99": ("p99_ttft_ms", ("latency", "ttft", "p99"), 1000.0),
    "TPOT P99": ("p99_tpot_ms", ("latency", "tpot", "p99"), 1000.0),
}
"""By name: the replay's figure, where the simulator has it, and its factor to that unit."""


def one_run(name: str, admin: AdminClient, workload: str) -> dict[str, Any]:
    """Measure the cluster, or replay the workload, as the file's name tells."""
    if name.startswith("profile"):
        like = load_profile(LIKE)
        profile, checks = calibrate_cluster(admin.url, None, "", MODEL, True, like, _say)
        error = fmean(abs(one.error) for one in checks)
        return {"profile": format_profile(profile), "left_out_error": error}
    requests = load_workload(workload, SEED)
    # Each run asks with words of its own: nothing is in a prefix cache from the one before.
    number = int(Path(name).stem.rpartition("-")[2])
    results, seconds = served_cluster.replayed(admin.url, requests, SEED + number)
    figures = summarize(results, seconds)
    return {
        "failed": figures["failed"],
        **{name: figures[real] for name, (real, _, _) in FIGURES.items()},
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def simulated(profile: Path, workload: str, runs: int) -> list[dict[str, float]]:
    """The figures of simulations, as ``drover simulate`` would run them, each with a seed."""
    plan = make_plan(
        SimulateConfig(
            workload=workload,
            seed=SEED,
            profile=(f"{profile}*{INSTANCES}",),
            policies="freeness",
            set=tuple(f"{key}={value}" for key, value in SETTINGS.items()),
        )
    )
    (scenario,) = plan.scenarios.values()
    made = []
    for number in range(runs):
        seeded = dataclasses.replace(scenario, seed=SEED + number)
        found = simulated_results.summarize(Simulation(seeded, plan.workload).run())
        made.append(
            {
                name: factor * campaign.found(found, path)
                for name, (_, path, factor) in FIGURES.items()
            }
        )
    return made


def spread(values: Sequence[float]) -> float:
    """By which part of their median values differ."""
    return (max(values) - min(values)) / median(values)


def rows_of(
    real: Sequence[Mapping[str, float]], ours: Sequence[Mapping[str, float]]
) -> list[dict[str, Any]]:
    """Figure by figure: both kinds' median and spread, and how far off the simulator is."""
    rows = []
    for name in FIGURES:
        values, simulations = ([one[name] for one in runs] for runs in (real, ours))
        off = median(simulations) / median(values) - 1.0
        rows.append(
            {
                "figure": name,
                "real": median(values),
                "spread": spread(values),
                "simulated": median(simulations),
                "simulated_spread": spread(simulations),
                "off": off,
                "may_be": max(P99, spread(values)) if name.endswith("P99") else MEAN,
            }
        )
    return rows


def targets_of(rows: Sequence[Mapping[str, Any]]) -> list[Target]:
    """The verdict."""
    return [Target(f"{row['figure']} off by", abs(row["off"]), row["may_be"]) for row in rows]


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment, print its result, answer with the verdict."""
    options = served_cluster.options(__doc__ or "", "simulation_fidelity")
    options.add_argument("--real", type=int, default=5, help="real runs of the workload")
    given = options.parse_args(arguments)
    workload = QUICK_WORKLOAD if given.quick else WORKLOAD
    kind, number = ("quick", 1) if given.quick else ("real", given.real)
    of = "_modelled" if given.modelled else ""
    names = [f"{kind}{of}-{run}.json" for run in range(number)]
    before, *after = (
        f"profile{of}-{when}.json" for when in ("before", "after")[: 1 if given.quick else 2]
    )
    flags = ["--instances", str(INSTANCES)]
    for key, value in SETTINGS.items():
        flags += [f"--{key}", value]
    left = served_cluster.take(
        [before, *names, *after],
        given.runs,
        given.at_most,
        functools.partial(
            served_cluster.served, MODEL, flags, given.runs / "serve.log", given.modelled
        ),
        functools.partial(one_run, workload=workload),
    )
    if left:
        print(f"{left} runs are left: call again", file=sys.stderr)
        return served_cluster.UNFINISHED
    real = [json.loads((given.runs / name).read_text()) for name in names]
    calibrated = []
    ours: list[dict[str, float]] = []
    for name in (before, *after):
        made = json.loads((given.runs / name).read_text())
        profile = (given.runs / name).with_suffix(".yaml")
        profile.write_text(made["profile"], encoding="utf-8")
        calibrated.append(made)
        ours += simulated(profile, workload, len(real))
    rows = rows_of(real, ours)
    keys = ("figure", "real", "spread", "simulated", "simulated_spread", "off", "may_be")
    print_table(
        ("figure", "real, median", "spread", "simulated", "spread", "off", "may be off"),
        [[row[key] for key in keys] for row in rows],
    )
    result = {
        "model": MODEL,
        "modelled": given.modelled,
        "workload": workload,
        "rows": rows,
        "runs": real,
        "simulations": ours,
        "profiles": calibrated,
    }
    return finish(result, targets_of(rows), given.json)


if __name__ == "__main__":
    sys.exit(main())
