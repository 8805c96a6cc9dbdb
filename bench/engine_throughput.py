"""How many output tokens per second does the engine give, and the others?

Our engine (in process, without Ray) against transformers' padded ``generate`` with its
dynamic and its static cache, transformers' continuous batching in three settings, and, when
DROVER_VLLM_PYTHON names an interpreter that has it, vLLM: same model, prompts, bfloat16 and
threads. Each side runs in a fresh process, one after the other, in every round.

Equal lengths: 32 requests of 128 tokens, 64 to generate. Mixed lengths: 64 requests as long
as the first turns of ShareGPT conversations, scaled and clipped; all are there at the
start, padded sides take them in batches of 32 in the order of arrival, and the time until
the last one ends counts. Only the tokens that were asked for count.

    python -m bench.engine_throughput [--quick] [--json PATH] [--rounds N] [--threads N]
        [--sides A,B] [--samples FILE]

A run can be taken in parts: those that name a file of samples add to it, and the last, with
no rounds of its own perhaps, counts them all.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.engine_sides import CONTINUOUS, Workload
from bench.report import Target, finish, median, parser, print_table
from instance.model.resolve import resolve_model

ROOT = Path(__file__).resolve().parent.parent
TRACE = "lengths_sharegpt_firstturn.csv.gz"
SCALE = 0.25
"""Of the trace's lengths, so that a round takes minutes."""
PROMPT_RANGE = (8, 512)
OUTPUT_RANGE = (4, 256)


def prompt(length: int, draw: random.Random) -> list[int]:
    return [draw.randrange(100, 40_000) for _ in range(length)]


def equal_lengths(requests: int, prompt_tokens: int, outputs: int) -> Workload:
    draw = random.Random(1)
    prompts = [prompt(prompt_tokens, draw) for _ in range(requests)]
    return Workload("equal", prompts, [outputs] * requests)


def mixed_lengths(requests: int) -> Workload:
    """Lengths of a sample of the trace.

    Raises:
        FileNotFoundError: if the trace is not where DROVER_TRACES points.
    """
    folder = Path(os.environ.get("DROVER_TRACES") or ROOT.parent / "shared" / "traces")
    with gzip.open(folder / TRACE, "rt", newline="") as file:
        rows = list(csv.DictReader(file))
    draw = random.Random(2)
    chosen = draw.sample(rows, requests)

    def clip(tokens: str, low: int, high: int) -> int:
        return min(max(round(int(tokens) * SCALE), low), high)

    return Workload(
        "mixed",
        [prompt(clip(row["ContextTokens"], *PROMPT_RANGE), draw) for row in chosen],
        [clip(row["GeneratedTokens"], *OUTPUT_RANGE) for row in chosen],
    )


def run_side(
    name: str, folder: Path, threads: int, workloads: list[Workload]
) -> tuple[list[dict[str, Any]], str]:
    """Results of one side in a fresh process, and its version where it tells one.

    Raises:
        RuntimeError: if the process failed.
    """
    task = {
        "folder": str(folder),
        "threads": threads,
        "workloads": [dataclasses.asdict(workload) for workload in workloads],
    }
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    if name == "vllm":
        command = [os.environ["DROVER_VLLM_PYTHON"], str(ROOT / "bench" / "vllm_side.py")]
    else:
        command = [sys.executable, "-m", "bench.engine_sides", name]
    with tempfile.TemporaryDirectory() as scratch:
        asked, answer = Path(scratch, "workloads.json"), Path(scratch, "results.json")
        asked.write_text(json.dumps(task))
        done = subprocess.run(
            [*command, str(asked), str(answer)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
        found = json.loads(answer.read_text())
    return found["results"], found["version"]


def run(options: argparse.Namespace) -> dict[str, Any]:
    folder = resolve_model(options.model)
    if options.quick:
        workloads = [equal_lengths(16, 64, 24), mixed_lengths(16)]
        workloads[1].outputs[:] = [min(48, count) for count in workloads[1].outputs]
        sides = ["drover", "padded_dynamic", "padded_static", "continuous_large"]
    else:
        workloads = [equal_lengths(32, 128, 64), mixed_lengths(64)]
        sides = ["drover", "padded_dynamic", "padded_static", *CONTINUOUS]
    sampled = dataclasses.replace(workloads[0], name="sampled", temperature=0.8, top_p=0.95)
    if os.environ.get("DROVER_VLLM_PYTHON"):
        sides.append("vllm")
    if options.sides:
        sides = [side for side in sides if side in options.sides.split(",")]
    kept = _kept(options.samples)
    for number in range(1 if options.quick else options.rounds):
        # Every side comes first at times.
        first = number % max(1, len(sides))
        for side in sides[first:] + sides[:first]:
            extra = [sampled] if side == "drover" else []
            results, version = run_side(side, folder, options.threads, workloads + extra)
            for result in results:
                kept.append({"side": side, "version": version, **result})
                _keep(options.samples, kept[-1])
                print(
                    f"round {number} {side:22} {result['workload']:8} {result['seconds']:7.2f} s",
                    file=sys.stderr,
                    flush=True,
                )
    samples: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in kept:
        samples.setdefault((one["side"], one["workload"]), []).append(one)
    tokens = {workload.name: workload.tokens for workload in [*workloads, sampled]}
    rows = [
        {
            "side": side,
            "version": found[-1]["version"],
            "workload": workload,
            "tokens": tokens[workload],
            "seconds": [one["seconds"] for one in found],
            "tokens_per_second": tokens[workload] / median(one["seconds"] for one in found),
            "outside_model": median(
                one["outside_model"] for one in found if "outside_model" in one
            ),
        }
        for (side, workload), found in samples.items()
    ]
    return {"model": options.model, "dtype": "bfloat16", "threads": options.threads, "rows": rows}


def _kept(path: Path | None) -> list[dict[str, Any]]:
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def _keep(path: Path | None, sample: dict[str, Any]) -> None:
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(sample) + "\n")


def targets(rows: list[dict[str, Any]]) -> list[Target]:
    """The verdict on a run's rows, where all sides of this machine are among them."""
    rate = {(row["side"], row["workload"]): row["tokens_per_second"] for row in rows}
    outside = {row["workload"]: row["outside_model"] for row in rows if row["side"] == "drover"}
    dynamic, static = (rate["padded_dynamic", "equal"], rate["padded_static", "equal"])
    ours = {name: rate["drover", name] for name in ("equal", "mixed")}
    continuous = [rate[side, "mixed"] for side in CONTINUOUS if (side, "mixed") in rate]
    padded = [rate[side, "mixed"] for side in ("padded_dynamic", "padded_static")]
    best = max(*padded, *continuous)
    found = [
        Target("equal, over the better cache", ours["equal"] / max(dynamic, static), 1.0, False),
        Target("equal, over the dynamic cache", ours["equal"] / dynamic, 1.5, False),
        Target("mixed, over transformers' best", ours["mixed"] / best, 2.0, False),
        Target("outside the model, greedy", outside["equal"], 0.1),
        Target("outside the model, temperature and top-p", outside["sampled"], 0.2),
    ]
    for name in ("equal", "mixed"):
        if ("vllm", name) in rate:
            ratio = ours[name] / rate["vllm", name]
            found.append(Target(f"{name}, over vLLM", ratio, 0.9, False))
    return found


def main() -> int:
    """Run the experiment, print its result, answer with the verdict."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--model", default="smollm2")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--sides", help="only these, with commas between; there is no verdict")
    arguments.add_argument(
        "--samples",
        type=Path,
        help="keep what is measured in this file, and count what it holds already",
    )
    arguments.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = arguments.parse_args()
    result = run(options)
    print_table(
        ("workload", "side", "tokens", "median s", "tokens/s", "outside model %"),
        [
            (row["workload"], row["side"], row["tokens"], median(row["seconds"]),
             row["tokens_per_second"], 100 * row["outside_model"])
            for row in sorted(result["rows"], key=lambda row: row["workload"])
        ],
    )  # fmt: skip
    verdict = [] if options.sides else targets(result["rows"])
    return finish(result, verdict, options.json)


if __name__ == "__main__":
    sys.exit(main())
