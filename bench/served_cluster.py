"""A real cluster for a bench: ``drover serve`` in processes of its own, and what is sent to it.

Runs take real time, and a cluster serves many of them: each leaves a file, and those whose
file is there are not repeated (see ``take``).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from bench import campaign
from cluster.admin_client import AdminClient
from cluster.ray_setup import free_port
from cluster.replay.results import RequestResult
from cluster.replay.run import Replay, replay_greedily
from cluster.simulation.workloads.records import WorkloadRequest

START = 900.0
"""Seconds that a cluster may take to start."""
LOOK = 0.25
"""Seconds between two looks whether this process gets CPU."""
STOOD_STILL = 2.0
"""Seconds without, from which on a run does not count."""
PAUSE = 15.0
"""Seconds after a run that does not count: the cluster finds itself again."""
TRIES = 3
"""Of a run."""
UNFINISHED = 2
"""Exit status where runs are left for a later call."""


def options(description: str, folder: str) -> argparse.ArgumentParser:
    """A bench's parser with what benches of real clusters share.

    Args:
        description: The bench's own text.
        folder: Where the files of its runs are unless told otherwise, below ``build``.
    """
    made = campaign.run_options(description, folder)
    made.add_argument(
        "--at-most", type=int, default=0, metavar="N", help="real runs of this call; 0: all"
    )
    made.add_argument(
        "--modelled", action="store_true", help="steps only take time; see bench.modelled_serve"
    )
    return made


@contextlib.contextmanager
def served(
    model: str, flags: Sequence[str], log: Path, modelled: bool = False
) -> Iterator[AdminClient]:
    """Run ``drover serve`` on this machine until the block ends.

    Args:
        model: Its name or folder.
        flags: Of the command line.
        log: The file that gets its output.
        modelled: Its instances only take the time of steps; see ``bench.modelled_serve``.

    Raises:
        RuntimeError: It did not start; the text is the end of its output.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    port, key = free_port("127.0.0.1"), secrets.token_urlsafe(16)
    program = "bench.modelled_serve" if modelled else "cluster.cli"
    command = [sys.executable, "-m", program, "serve", model, "--port", str(port), *flags]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "DROVER_ADMIN_KEY": key},
        )
    admin = AdminClient(f"http://127.0.0.1:{port}", key)
    try:
        _wait(process, admin.url, log)
        yield admin
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"no cluster:\n{log.read_text(errors='replace')[-2000:]}")


class DisturbedError(Exception):
    """The machine stood still during a run: it says nothing."""


def replayed(
    url: str, requests: Sequence[WorkloadRequest], seed: int
) -> tuple[list[RequestResult], float]:
    """Send a workload; what became of its requests, and the seconds that it took.

    Raises:
        DisturbedError: This process, and so likely all, got no CPU for a while.
    """
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        last = time.monotonic()
        while True:
            await asyncio.sleep(LOOK)
            now = time.monotonic()
            longest, last = max(longest, now - last - LOOK), now

    async def run() -> Replay:
        watching = asyncio.create_task(watch())
        replay = await replay_greedily(url, "", requests, seed)
        watching.cancel()
        return replay

    done = asyncio.run(run())
    if longest > STOOD_STILL:
        raise DisturbedError(f"nothing ran for {longest:.0f} s")
    return done.results, done.seconds


def metric(url: str, name: str) -> float:
    """The sum of a metric over all its labels."""
    text = httpx.get(f"{url}/metrics", timeout=30).raise_for_status().text
    return total(text, name)


def total(text: str, name: str) -> float:
    """The sum of a metric's samples in an exposition of Prometheus."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    )


def _undisturbed(
    name: str, admin: AdminClient, run: Callable[[str, AdminClient], dict[str, Any]]
) -> dict[str, Any]:
    """A run that counts."""
    for _ in range(TRIES - 1):
        try:
            return run(name, admin)
        except DisturbedError as error:
            print(f"{name}: {error}; once more", file=sys.stderr, flush=True)
            time.sleep(PAUSE)
    return run(name, admin)


def take(
    names: Sequence[str],
    folder: Path,
    at_most: int,
    cluster: Callable[[], contextlib.AbstractContextManager[AdminClient]],
    run: Callable[[str, AdminClient], dict[str, Any]],
) -> int:
    """Do runs that have no file yet, on one cluster, which is started if any is wanted.

    Args:
        names: Of the runs' files, in the order in which they are done.
        folder: Where the files are.
        at_most: Runs to do; 0 for all.
        cluster: Starts it.
        run: Does one; the result goes into its file.

    Returns:
        How many are left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not (folder / name).exists()]
    now = missing[: at_most or len(missing)]
    if now:
        with cluster() as admin:
            for name in now:
                began = time.monotonic()
                campaign.write_result(_undisturbed(name, admin, run), folder / name)
                print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return len(missing) - len(now)
