"""Start a real ``drover serve`` for a test and talk to it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil

from cluster.ray_setup import free_port

ADMIN_KEY = "test-admin-key"


class Cluster:
    """A running ``drover serve`` and its HTTP side."""

    def __init__(self, process: subprocess.Popen[str], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.log = log
        self.url = f"http://127.0.0.1:{port}"
        self.admin = httpx.Client(
            base_url=self.url, headers={"authorization": f"Bearer {ADMIN_KEY}"}, timeout=60
        )

    def client(self, **options: Any) -> openai.OpenAI:
        options.setdefault("max_retries", 0)
        options.setdefault("timeout", 120)
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", **options)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120
        )

    def status(self) -> dict[str, Any]:
        answer = self.admin.get("/admin/status")
        answer.raise_for_status()
        return dict(answer.json())

    def requests(self) -> list[dict[str, Any]]:
        answer = self.admin.get("/admin/requests")
        answer.raise_for_status()
        return list(answer.json()["requests"])

    def migrate(self, request_id: str, destination: str | None = None) -> dict[str, Any]:
        answer = self.admin.post(
            "/admin/migrate", json={"request_id": request_id, "destination": destination}
        )
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def instance_pids(self) -> dict[str, int]:
        """Process ids by instance id."""
        return {one["instance_id"]: one["pid"] for one in self.status()["instances"]}

    def wait_until(self, what: str, test: Callable[[], bool], timeout: float = 180) -> None:
        """Poll ``test``; fails with ``what`` and the log's end after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while not test():
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout} s: {what}\n{self.log_tail()}")
            time.sleep(0.1)

    def wait_idle(self) -> None:
        """Wait until no instance uses a block or holds a request; its pools must be sound."""

        def idle() -> bool:
            checks = self.admin.get("/admin/check").json()["instances"]
            return all(
                "error" not in one and one["used_blocks"] == 0 and one["sequences"] == 0
                for one in checks
            )

        self.wait_until("zero used blocks on every instance", idle)

    def log_tail(self, size: int = 4000) -> str:
        return self.log.read_text(errors="replace")[-size:]


def process_tree(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@contextlib.contextmanager
def serve(
    model: str | Path,
    *flags: str,
    ready: float = 150,
    env: dict[str, str] | None = None,
    module: str = "cluster.cli",
) -> Iterator[Cluster]:
    """Run ``drover serve`` as a user would, until the block ends; then Ctrl-C.

    Args:
        model: Its folder or name.
        flags: Of the command line.
        ready: Seconds that the start may take.
        env: Environment variables beside those of the tests.
        module: What stands for ``drover``.
    """
    port = free_port("127.0.0.1")
    folder = Path(tempfile.mkdtemp(prefix="drover-e2e-"))
    log = folder / "serve.log"
    command = [
        sys.executable,
        "-m",
        module,
        "serve",
        str(model),
        "--port",
        str(port),
        "--admin-key",
        ADMIN_KEY,
        *flags,
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
        )
    cluster = Cluster(process, port, log)
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + ready
        while True:
            if process.poll() is not None:
                raise AssertionError(
                    f"drover serve ended with {process.returncode}:\n{cluster.log_tail()}"
                )
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{cluster.url}/health", timeout=2).status_code == 200:
                    break
            if time.monotonic() > deadline:
                raise AssertionError(f"not ready within {ready} s:\n{cluster.log_tail()}")
            time.sleep(0.2)
        yield cluster
    finally:
        cluster.admin.close()
        family = process_tree(process.pid)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        _, alive = psutil.wait_procs(family, timeout=10)
        for left in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
    if alive:
        raise AssertionError(f"processes left behind: {alive}\n{cluster.log_tail()}")


def stream_text(client: openai.OpenAI, **options: Any) -> tuple[str, str, str]:
    """Stream a chat or a completion to its end: (request id, text, finish reason)."""
    text, request_id, reason = "", "", ""
    if "messages" in options:
        for chunk in client.chat.completions.create(stream=True, **options):
            request_id = chunk.id
            for choice in chunk.choices:
                text += choice.delta.content or ""
                reason = choice.finish_reason or reason
    else:
        for part in client.completions.create(stream=True, **options):
            request_id = part.id
            for one in part.choices:
                text += one.text or ""
                reason = one.finish_reason or reason
    return request_id, text, reason


def metric(text: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples whose labels match, from a Prometheus exposition."""
    total = 0.0
    for line in text.splitlines():
        match = re.match(rf"{re.escape(name)}(?:\{{(.*)\}})? (\S+)$", line)
        if match is None:
            continue
        found = dict(re.findall(r'(\w+)="([^"]*)"', match[1] or ""))
        if all(found.get(key) == value for key, value in labels.items()):
            total += float(match[2])
    return total
