"""Many simulated runs: a file for each, two at a time, resumed; and what to make of them.

A campaign is a list of runs. Each leaves its result as a file in a folder, and one whose file
is there is not run again, so that a campaign that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bench.report import median, parser
from cluster.dispatcher.core import DispatcherConfig
from cluster.simulation.device import DeviceMaker, device
from cluster.simulation.profile_files import load_profile
from cluster.simulation.simulation import Scenario
from instance.config import EngineConfig, MigrationConfig, SchedulerConfig

ROOT = Path(__file__).resolve().parent.parent

TESTBED: dict[str, Any] = {
    "profile": "llama-7b-a10",
    "max_num_seqs": 256,
    "max_num_batched_tokens": 2048,
    "migration_bytes_per_second": 1e9,
    "kv_tokens": 12_800,
    "max_tokens": 6144,
}
"""Llumnix's (OSDI '24, section 6.1): LLaMA-7B, on an A10 each, and what its clients ask."""


class Run(Protocol):
    """One run of a campaign; a frozen dataclass, since it goes to another process."""

    @property
    def file_name(self) -> str:
        """Tells the run from all others; see ``file_name``."""

    def execute(self) -> dict[str, Any]:
        """Do it; the result is ready for JSON."""


def run_options(description: str, folder: str) -> argparse.ArgumentParser:
    """A bench's parser with a folder for the files of its runs.

    Args:
        description: The bench's own text.
        folder: Where the files are unless told otherwise, below ``build``.
    """
    made = parser(description)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--runs", type=Path, default=Path("build") / folder)
    return made


def options(description: str, folder: str) -> argparse.ArgumentParser:
    """The same with the options of a campaign."""
    made = run_options(description, folder)
    made.add_argument("--workers", type=int, choices=(1, 2), default=2)
    return made


def file_name(words: Sequence[object], settings: Mapping[str, Any], run: Any) -> str:
    """A name for people, with a digest of all that the result depends on.

    Args:
        words: What people tell the run by.
        settings: What every run of the campaign has in common.
        run: A dataclass.
    """
    text = json.dumps([settings, dataclasses.astuple(run)])
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    shown = (f"{word:g}" if isinstance(word, float) else str(word) for word in words)
    stem = "-".join(shown).lower().replace(" ", "-").replace("+", "p")
    return f"{stem}-{digest}.json"


def run_to_file(run: Run, folder: Path) -> None:
    """Execute a run; its result becomes a file."""
    write_result(run.execute(), folder / run.file_name)


def write_result(result: Mapping[str, Any], path: Path) -> None:
    """Leave a result as a whole file or none."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result) + "\n")
    part.replace(path)


def run_all(runs: Iterable[Run], folder: Path, workers: int) -> list[dict[str, Any]]:
    """The results of all runs; those whose file is there are read."""
    wanted = list(runs)
    folder.mkdir(parents=True, exist_ok=True)
    named = {run.file_name: run for run in wanted}
    missing = [run for name, run in named.items() if not (folder / name).exists()]
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _end_with_parent) as pool:
        jobs = {pool.submit(run_to_file, run, folder): run for run in missing}
        try:
            for number, job in enumerate(concurrent.futures.as_completed(jobs), 1):
                job.result()
                print(
                    f"{number}/{len(missing)} {time.monotonic() - began:.0f} s  "
                    f"{jobs[job].file_name}",
                    file=sys.stderr,
                    flush=True,
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [json.loads((folder / run.file_name).read_text()) for run in wanted]


def _end_with_parent() -> None:
    """Let this worker end when the bench does, however that ends; a run takes minutes."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ---- what runs are made of


def traces() -> Path:
    """The folder of recorded traces."""
    return Path(os.environ.get("DROVER_TRACES") or ROOT.parent / "shared" / "traces")


def machine(settings: Mapping[str, Any]) -> DeviceMaker:
    """The device of every instance of a campaign; ``settings`` as in ``TESTBED``."""
    profile = load_profile(settings["profile"])
    blocks = settings["kv_tokens"] // profile.model.block_size
    profile = dataclasses.replace(profile, num_blocks=blocks)
    return device(profile, settings["migration_bytes_per_second"])


def scenario(
    settings: Mapping[str, Any],
    instances: int,
    dispatcher: DispatcherConfig,
    seed: int,
    prefix_caching: bool = False,
) -> Scenario:
    """A cluster of equal instances under the settings of a campaign, as in ``TESTBED``."""
    return Scenario(
        devices=(machine(settings),) * instances,
        engine=EngineConfig(
            scheduler=SchedulerConfig(
                max_num_seqs=settings["max_num_seqs"],
                max_num_batched_tokens=settings["max_num_batched_tokens"],
                max_model_len=settings["kv_tokens"],
                enable_prefix_caching=prefix_caching,
            ),
            migration=MigrationConfig(max_bytes_per_second=settings["migration_bytes_per_second"]),
        ),
        dispatcher=dispatcher,
        max_tokens=settings["max_tokens"],
        seed=seed,
    )


# ---- what comes of runs


def found(figures: Mapping[str, Any], path: Sequence[str]) -> float:
    """The figure at a path of keys."""
    value: Any = figures
    for key in path:
        value = value[key]
    return float(value)


def medians(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of every figure, over runs that differ by their seed alone."""
    return {name: median(one[name] for one in results) for name in results[0]}


def geometric_mean(values: Iterable[float]) -> float:
    """Of values above 0; nan for none."""
    logs = [math.log(value) for value in values]
    return math.exp(math.fsum(logs) / len(logs)) if logs else float("nan")


def interval(ratios: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """Where the geometric mean of paired ratios lies with 95 % confidence (bootstrap).

    Args:
        ratios: One for each pair of runs that had the same workload, above 0.
        draws: Samples of the pairs, with replacement.
    """
    if not ratios:
        return float("nan"), float("nan")
    logs = np.log(np.asarray(ratios))
    picked = np.random.default_rng(0).integers(0, len(logs), (draws, len(logs)))
    low, high = np.percentile(logs[picked].mean(axis=1), (2.5, 97.5))
    return float(np.exp(low)), float(np.exp(high))
