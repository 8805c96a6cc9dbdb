"""Do moves make up for a placement that does not look at the load?

A real cluster, two instances of one thread, places by ``round_robin`` on arrival, and every other
request is long: all of these go to one instance, whose memory holds only some at a time. The
same workload is replayed in pairs, with rebalancing and without, on one cluster, by the
admin API; each of the two comes first in turn. Between two runs the cluster is idle.

A ratio is that of a pair, rebalancing over not; the targets are on the median of the pairs.

Each run leaves a file in the folder --runs, and is not repeated where that is there.

    python -m bench.rebalance [--quick] [--json PATH] [--runs FOLDER] [--pairs N] [--at-most N]
        [--modelled]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import served_cluster
from bench.report import Target, finish, median, print_table
from cluster.admin_client import AdminClient
from cluster.replay.results import summarize
from cluster.simulation.workloads.generators import single_requests
from cluster.simulation.workloads.records import WorkloadRequest

MODEL = "smollm2"
FLAGS = (
    *("--instances", "2", "--threads", "1"),
    *("--placement", "round_robin", "--run-ahead", "-1"),
    *("--dtype", "bfloat16", "--num-gpu-blocks-override", "161", "--max-model-len", "1024"),
)
"""160 usable blocks hold six long requests."""
RATE, MODELLED_RATE = 3.0, 1.2
"""Requests per second, half of them long: a little more of these than one instance serves. Modelled
steps take twice as long."""
SECONDS, QUICK_SECONDS = 30.0, 8.0
LONG, SHORT = (192, 224), (32, 8)
"""Tokens of prompt and answer."""
ON, OFF = "on", "off"
MOVED = "/moved"
"""Behind the reason, in the dispatcher's counters."""
SETTLE = 3.0
"""Seconds after which counters of what has ended are there to read."""
PREEMPTIONS = "vllm:num_preemptions_total"
FIGURES = ("mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "mean_e2el_ms", "p99_e2el_ms")


def workload(seed: int, seconds: float, rate: float) -> list[WorkloadRequest]:
    """Long and short requests by turns, at random times (Poisson)."""
    rng = np.random.default_rng(seed)
    times = np.sort(rng.uniform(0.0, seconds, round(rate * seconds))).tolist()
    kinds = [kind for _, kind in zip(times, itertools.cycle((LONG, SHORT)), strict=False)]
    prompts, outputs = zip(*kinds, strict=True)
    return single_requests(times, list(prompts), list(outputs))


def names_of(pairs: int, quick: bool, modelled: bool) -> list[str]:
    """Files of the runs, in their order."""
    kind = ("quick" if quick else "run") + ("_modelled" if modelled else "")
    return [
        f"{kind}-{number}-{side}.json"
        for number in range(pairs)
        for side in ((ON, OFF) if number % 2 else (OFF, ON))
    ]


def one_run(name: str, admin: AdminClient) -> dict[str, Any]:
    """A replay under the setting that the file's name tells."""
    kind, number, side = Path(name).stem.split("-")
    seconds = QUICK_SECONDS if kind.startswith("quick") else SECONDS
    rate = MODELLED_RATE if "modelled" in kind else RATE
    requests = workload(int(number), seconds, rate)
    # Words of its own: nothing is in a prefix cache from the other run of the pair.
    words = 2 * int(number) + (side == ON)
    admin.call("PATCH", "/admin/policies", {"rebalance": side == ON})
    before = served_cluster.metric(admin.url, PREEMPTIONS)
    moved_before = moves(admin)
    results, took = served_cluster.replayed(admin.url, requests, words)
    time.sleep(SETTLE)
    moved = {key: count - moved_before.get(key, 0) for key, count in moves(admin).items()}
    figures = summarize(results, took)
    return {
        "pair": int(number),
        "side": side,
        "completed": figures["completed"],
        "failed": figures["failed"],
        "seconds": took,
        "preemptions": served_cluster.metric(admin.url, PREEMPTIONS) - before,
        "moves": {key: count for key, count in moved.items() if count},
        **{figure: figures[figure] for figure in FIGURES},
    }


def moves(admin: AdminClient) -> dict[str, int]:
    """Requests that have moved so far, by reason."""
    ended = admin.call("GET", "/admin/status")["counters"].get("migrations_ended", {})
    return {key[: -len(MOVED)]: int(n) for key, n in ended.items() if key.endswith(MOVED)}


def pairs_of(
    results: Sequence[Mapping[str, Any]],
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """The runs with and without moves of each pair that has both."""
    by = {(one["pair"], one["side"]): one for one in results}
    numbers = sorted({pair for pair, _ in by})
    return [(by[n, ON], by[n, OFF]) for n in numbers if (n, ON) in by and (n, OFF) in by]


def ratio(results: Sequence[Mapping[str, Any]], figure: str) -> float:
    """Of a figure, with moves over without: the median of the pairs."""
    return median(on[figure] / off[figure] for on, off in pairs_of(results))


def targets_of(results: Sequence[Mapping[str, Any]]) -> list[Target]:
    """The verdict."""
    both = pairs_of(results)
    fewer = median(on["preemptions"] - off["preemptions"] for on, off in both)
    return [
        Target("P99 TTFT, on over off", ratio(results, "p99_ttft_ms"), 0.7),
        Target("preemptions, on less off", fewer, 0.0),
        Target("requests that failed", float(sum(one["failed"] for one in results)), 0.0),
    ]


def table(results: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """A line per run."""
    return [
        [
            one["pair"],
            one["side"],
            *(round(one[figure]) for figure in FIGURES),
            round(one["preemptions"]),
            " ".join(f"{reason} {count}" for reason, count in one["moves"].items()),
        ]
        for one in results
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the experiment, print its result, answer with the verdict."""
    made = served_cluster.options(__doc__ or "", "rebalance")
    made.add_argument("--pairs", type=int, default=5)
    given: argparse.Namespace = made.parse_args(arguments)
    names = names_of(1 if given.quick else given.pairs, given.quick, given.modelled)
    log = given.runs / "serve.log"
    cluster = functools.partial(served_cluster.served, MODEL, FLAGS, log, given.modelled)
    left = served_cluster.take(names, given.runs, given.at_most, cluster, one_run)
    if left:
        print(f"{left} runs are left: call again", file=sys.stderr)
        return served_cluster.UNFINISHED
    results = [json.loads((given.runs / name).read_text()) for name in names]
    print_table(("pair", "rebalance", *FIGURES, "preempted", "moved"), table(results))
    settings = {
        "model": MODEL,
        "modelled": given.modelled,
        "flags": FLAGS,
        "rate": MODELLED_RATE if given.modelled else RATE,
        "long": LONG,
        "short": SHORT,
    }
    return finish({"settings": settings, "runs": results}, targets_of(results), given.json)


if __name__ == "__main__":
    sys.exit(main())
