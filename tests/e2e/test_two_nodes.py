"""Two Ray nodes on this machine: instances on both, and a request that moves between them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.ray_setup import free_port, short_temp_dir
from tests.e2e.serving import process_tree, serve, stream_text

pytestmark = pytest.mark.timeout(300)
WAIT_FOR_NODES = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < 2:
    time.sleep(0.2)
"""
ROOT = Path(__file__).resolve().parent.parent.parent


def node(folder: str, *flags: str) -> subprocess.Popen[bytes]:
    """A Ray node as an operator starts it, in a process group of its own."""
    return subprocess.Popen(
        [
            str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1",
            "--object-store-memory=100000000", "--disable-usage-stats", *flags,
        ],
        env={**os.environ, "RAY_TMPDIR": folder, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip


@pytest.fixture
def ray_address() -> Iterator[str]:
    folder, port = short_temp_dir(), free_port("127.0.0.1")
    address = f"127.0.0.1:{port}"
    nodes = [
        node(
            folder, "--head", f"--port={port}", "--node-ip-address=127.0.0.1",
            "--include-dashboard=false", f"--temp-dir={folder}",
        )
    ]  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not any(
            one.laddr.port == port and one.status == psutil.CONN_LISTEN
            for one in psutil.net_connections("tcp")
        ):
            assert time.monotonic() < deadline, "the Ray head does not listen"
            time.sleep(0.2)
        nodes.append(node(folder, f"--address={address}", "--node-ip-address=127.0.0.2"))
        subprocess.run([sys.executable, "-c", WAIT_FOR_NODES, address], check=True, timeout=90)
        yield address
    finally:
        family = [one for started in nodes for one in process_tree(started.pid)]
        for started in reversed(nodes):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=3)
        for left in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        subprocess.run(["rm", "-rf", folder], check=True)


def test_a_request_moves_from_node_to_node(ray_address: str, tiny_llama: Path) -> None:
    with serve(
        tiny_llama,
        "--address", ray_address,
        "--instances", "2",
        "--dtype", "float64",
        "--served-model-name", "tiny",
        "--num-gpu-blocks-override", "512",
        "--rebalance", "off",
    ) as cluster:  # fmt: skip
        hosts = {one["address"].split(":")[0] for one in cluster.status()["instances"]}
        # Ray names the head by this machine's own address, whatever it was started with.
        assert len(hosts) == 2
        assert "127.0.0.2" in hosts
        request = {
            "model": "tiny",
            "prompt": "From node to node",
            "max_tokens": 1200,
            "temperature": 0.8,
            "seed": 5,
            "extra_body": {"ignore_eos": True},
        }
        _, unmoved, _ = stream_text(cluster.client(), **request)
        text, reports = "", []
        stream = cluster.client().completions.create(stream=True, **request)
        for number, part in enumerate(stream):
            text += "".join(choice.text or "" for choice in part.choices)
            if number in (5, 15):
                reports.append(cluster.migrate(part.id))
        assert [one["outcome"] for one in reports] == ["moved", "moved"]
        assert reports[0]["destination"] == reports[1]["source"]
        assert text == unmoved
        cluster.wait_idle()
