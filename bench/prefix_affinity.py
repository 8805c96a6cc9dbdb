"""What does it bring to send requests where their prefix is, and what does it cost in balance?

BatchLLM's measure, simulated: eight instances of Llama 3 8B on an A10 each, with prefix caches.
Two workloads: many requests over few long prefixes, of which some are asked for more often (by
Zipf's law), and the conversations of several turns of Mooncake's trace, lengths and time scaled
to what the instances bear. Every placement policy serves the same requests.

The hit rate is the share of prompt tokens that a cache held; imbalance is the most prompt tokens
that an instance computed over the mean. The verdict is on `prefix`: its hit rate over the best of
all policies, and its P99 time to the first token over that of the policy that balances best.

    python -m bench.prefix_affinity [--quick] [--json PATH] [--runs FOLDER] [--requests N]
        [--seeds N] [--workers N]
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench import campaign
from bench.report import Target, finish, print_table
from cluster.dispatcher.core import DispatcherConfig
from cluster.simulation.records import RequestRecord
from cluster.simulation.results import latencies
from cluster.simulation.simulation import Simulation
from cluster.simulation.workloads.arrivals import renewal
from cluster.simulation.workloads.records import Span, WorkloadRequest
from cluster.simulation.workloads.sources import load_workload

SETTINGS: dict[str, Any] = {
    "profile": "llama-8b-a10",
    "max_num_seqs": 256,
    "max_num_batched_tokens": 2048,
    "migration_bytes_per_second": 1e9,
    "kv_tokens": 32_000,
    "max_tokens": 4096,
    "instances": 8,
    "prefixes": 64,
    "prefix_tokens": 2048,
    "zipf": 1.0,
    "trace_scale": 0.25,
    "trace_max": 8000,
}
"""``prefixes``, ``prefix_tokens``, ``zipf``: of the workload with few prefixes; ``trace_scale``:
of the trace's lengths; ``trace_max``: tokens of a request of it at most."""
SHARED, TURNS = "few prefixes", "conversations"
RATES = {SHARED: 12.0, TURNS: 6.0}
"""Requests per second."""
TRACE = "mooncake_conversation_0-2400s.jsonl.gz"
OURS = "prefix"
POLICIES = ("round_robin", "power_of_two", "least_loaded", "freeness", OURS)


def shared(rate: float, requests: int, seed: int) -> list[WorkloadRequest]:
    """Requests whose prompts are one of few prefixes and a tail of their own."""
    rng = np.random.default_rng(seed)
    weights = np.arange(1, SETTINGS["prefixes"] + 1) ** -SETTINGS["zipf"]
    chosen = rng.choice(len(weights), requests, p=weights / weights.sum())
    own, output = rng.integers(32, 257, requests), rng.integers(32, 129, requests)
    times = renewal(rng, rate, 1.0, requests)
    length = SETTINGS["prefix_tokens"]
    return [
        WorkloadRequest(
            arrival=float(times[at]),
            prompt=(Span(f"prefix-{chosen[at]}", length), Span(f"own-{at}", int(own[at]))),
            output_tokens=int(output[at]),
        )
        for at in range(requests)
    ]


def conversations(rate: float, requests: int, seed: int) -> list[WorkloadRequest]:
    """The first requests of the trace that fit, at another rate."""
    text = (
        f"mooncake:{campaign.traces() / TRACE}?scale={SETTINGS['trace_scale']}"
        f"&limit={requests}&rate={rate}&max-len={SETTINGS['trace_max']}"
    )
    return load_workload(text, seed)


@dataclass(frozen=True, slots=True)
class Run:
    """One simulation; ``rate`` is of all instances together."""

    workload: str
    policy: str
    rate: float
    seed: int
    requests: int
    instances: int

    @property
    def file_name(self) -> str:
        """Tells the run from all others, and from the same under other settings."""
        words = self.workload, self.policy, self.seed, self.requests
        return campaign.file_name(words, SETTINGS, self)

    def execute(self) -> dict[str, Any]:
        """The figures of the run."""
        scenario = campaign.scenario(
            SETTINGS,
            self.instances,
            DispatcherConfig(placement=self.policy),
            self.seed,
            prefix_caching=True,
        )
        make = shared if self.workload == SHARED else conversations
        requests = make(self.rate, self.requests, self.seed)
        outcome = Simulation(scenario, requests).run()
        done = [one for one in outcome.requests if one.status == "finished"]
        times = latencies(done)
        return {
            "run": dataclasses.asdict(self),
            "settings": SETTINGS,
            "figures": {
                **prefill_of(done, self.instances),
                "TTFT mean": times["ttft"]["mean"],
                "TTFT P99": times["ttft"]["p99"],
                "end to end mean": times["e2e"]["mean"],
            },
            "complete": outcome.complete,
        }


def prefill_of(done: Iterable[RequestRecord], instances: int) -> dict[str, float]:
    """Prompt tokens computed, the share that was cached, and how unevenly they fell."""
    asked = 0
    computed: Counter[str] = Counter()
    for one in done:
        asked += one.prompt_tokens
        computed[one.instances[0]] += one.prompt_tokens - max(0, one.cached)
    total = sum(computed.values())
    return {
        "prompt tokens computed": float(total),
        "hit rate": 1.0 - total / max(1, asked),
        "imbalance": max(computed.values()) * instances / max(1, total),
    }


Cells = dict[str, dict[str, dict[str, float]]]
"""By workload: by policy, the median over seeds of every figure."""


def cells_of(results: Iterable[Mapping[str, Any]]) -> Cells:
    """Results side by side."""
    grouped: dict[str, dict[str, list[Mapping[str, float]]]] = {}
    for result in results:
        run = result["run"]
        cell = grouped.setdefault(run["workload"], {})
        cell.setdefault(run["policy"], []).append(result["figures"])
    return {
        workload: {policy: campaign.medians(seeds) for policy, seeds in cell.items()}
        for workload, cell in grouped.items()
    }


def targets_of(cells: Cells) -> list[Target]:
    """What must hold: the best hit rate, at the best balance's times."""
    made = []
    for workload, cell in cells.items():
        ours = cell[OURS]
        best = max(one["hit rate"] for one in cell.values())
        balanced = min(cell.values(), key=lambda one: one["imbalance"])
        made += [
            Target(f"{workload}: hit rate over the best", ours["hit rate"] / best, 0.95, False),
            Target(
                f"{workload}: P99 TTFT over the best balanced policy's",
                ours["TTFT P99"] / balanced["TTFT P99"],
                1.05,
            ),
        ]
    return made


def show(cells: Cells) -> None:
    """A row per workload and policy."""
    names = list(next(iter(next(iter(cells.values())).values())))
    rows = [
        [workload, policy, *(figures[name] for name in names)]
        for workload, cell in cells.items()
        for policy, figures in cell.items()
    ]
    print_table(["workload", "policy", *names], rows)


def runs_of(quick: bool, requests: int, seeds: int) -> list[Run]:
    """All runs, workload by workload."""
    if quick:
        # A quarter of the cluster under a quarter of the load.
        count = SETTINGS["instances"] // 4
        return [Run(SHARED, policy, RATES[SHARED] / 4, 1, 200, count) for policy in POLICIES]
    return [
        Run(workload, policy, rate, seed, requests, SETTINGS["instances"])
        for workload, rate in RATES.items()
        for seed in range(1, seeds + 1)
        for policy in POLICIES
    ]


def main(arguments: list[str] | None = None) -> int:
    made = campaign.options(__doc__ or "", "prefix_affinity")
    made.add_argument("--requests", type=int, default=800)
    made.add_argument("--seeds", type=int, default=1)
    given = made.parse_args(arguments)
    runs = runs_of(given.quick, given.requests, given.seeds)
    results = campaign.run_all(runs, given.runs, given.workers)
    cells = cells_of(results)
    show(cells)
    result = {
        "settings": SETTINGS,
        "requests": runs[0].requests,
        "complete": all(one["complete"] for one in results),
        "cells": cells,
    }
    return finish(result, targets_of(cells), given.json)


if __name__ == "__main__":
    sys.exit(main())
