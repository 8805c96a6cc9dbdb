"""Instances come and go with the load on a real Ray, and one for which no machine has room."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.e2e.serving import Cluster, serve, stream_text

pytestmark = pytest.mark.timeout(300)

CLIENTS = 24
BLOCKS = 512
PATIENCE = 120.0
ROOM_TIMEOUT = 25
GPUS = 2
"""Machines' GPUs: room for two instances, one less than the load asks for."""


@pytest.fixture(scope="module")
def cluster(tiny_llama: Path) -> Iterator[Cluster]:
    with serve(
        tiny_llama,
        "--instances", "1",
        "--max-instances", "3",
        "--device", "cuda",
        "--dtype", "float64",
        "--served-model-name", "tiny",
        "--num-gpu-blocks-override", str(BLOCKS),
        "--max-num-seqs", "32",
        # Two instances under load have less than this per request, and idle ones have more.
        "--scale-up-threshold", str(2 * BLOCKS / (CLIENTS - 4)),
        "--scale-down-threshold", str(2 * BLOCKS / (CLIENTS - 4) + 20),
        "--scaling-period", "0.5",
        "--scaling-cooldown", "1",
        "--scale-out-timeout", str(ROOM_TIMEOUT),
        module="tests.e2e.declared_gpus",
        env={"RAY_OVERRIDE_RESOURCES": json.dumps({"GPU": GPUS})},
    ) as running:  # fmt: skip
        yield running


def options(prompt: str, tokens: int) -> dict[str, Any]:
    return {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0.8,
        "seed": 3,
        "extra_body": {"ignore_eos": True},
    }


@contextlib.contextmanager
def load(cluster: Cluster) -> Iterator[list[str]]:
    """Many clients that ask again and again while the block runs; yields what went wrong."""
    ending = threading.Event()
    wrong: list[str] = []

    def ask(number: int) -> None:
        client = cluster.client()
        while not ending.is_set():
            try:
                client.completions.create(**options(f"Client {number}", 200))
            except openai.OpenAIError as error:
                wrong.append(repr(error))
                return

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        yield wrong
    finally:
        ending.set()
        for client in clients:
            client.join()


def instances(cluster: Cluster) -> dict[str, dict[str, Any]]:
    return {one["instance_id"]: one for one in cluster.status()["instances"]}


def moves(cluster: Cluster, reason: str) -> list[dict[str, Any]]:
    found = cluster.status()["migrations"]
    return [one for one in found if (one["reason"], one["outcome"]) == (reason, "moved")]


def set_role(cluster: Cluster, instance_id: str, role: str) -> None:
    cluster.admin.post(
        "/admin/role", json={"instance_id": instance_id, "role": role}
    ).raise_for_status()


@contextlib.contextmanager
def streams(cluster: Cluster, request: dict[str, Any]) -> Iterator[list[str]]:
    """One long request after another while the block runs; yields their texts."""
    ending = threading.Event()
    texts: list[str] = []

    def read() -> None:
        while not ending.is_set():
            texts.append(stream_text(cluster.client(), **request)[1])

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield texts
    finally:
        ending.set()
        reader.join()


def test_instances_come_and_go_with_the_load(cluster: Cluster) -> None:
    request = options("From one to the other", 3000)
    _, unmoved, _ = stream_text(cluster.client(), **request)
    assert set(instances(cluster)) == {"instance-0"}

    def added() -> str:
        """The instance that the load brought and on which requests run; "" without one."""
        found = instances(cluster).items()
        return next((name for name, one in found if name != "instance-0" and one["running"]), "")

    def failed() -> dict[str, Any]:
        return dict(cluster.status()["scaling"]["failure"] or {})

    with load(cluster) as wrong:
        cluster.wait_until("requests run on another instance", lambda: bool(added()), PATIENCE)
        more = added()
        # A third is wanted and has no room: that is said, and the others serve on.
        (wanted,) = {"instance-1", "instance-2"} - {more}
        cluster.wait_until(
            "the third instance is given up",
            lambda: failed().get("instance_id") == wanted,
            PATIENCE,
        )
        assert failed()["why"] == f"no machine had room for {ROOM_TIMEOUT} s"
        assert cluster.client().completions.create(**options("Serve on", 8)).choices[0].text
        # What one instance has prefilled the other decodes.
        set_role(cluster, "instance-0", "prefill")
        set_role(cluster, more, "decode")
        cluster.wait_until("a hand-off", lambda: bool(moves(cluster, "handoff")), PATIENCE)
        assert set(instances(cluster)) == {"instance-0", more}
    assert wrong == []
    assert f"{wanted}: not started: no machine had room" in cluster.log.read_text()

    # The load is gone. Only the added instance can be spared once the first does both, so that
    # what runs there moves before it stops.
    process = psutil.Process(instances(cluster)[more]["pid"])
    with streams(cluster, request) as texts:
        cluster.wait_until(
            "the stream runs where it was handed to",
            lambda: [one["instance"] for one in cluster.requests()] == [more],
            PATIENCE,
        )
        set_role(cluster, "instance-0", "mixed")
        cluster.wait_until(
            "the instance has left", lambda: set(instances(cluster)) == {"instance-0"}, PATIENCE
        )
    assert set(texts) == {unmoved}
    assert moves(cluster, "scale_in")
    cluster.wait_until("its process has ended", lambda: not process.is_running(), PATIENCE)
    assert f"{more}: stopped, as the load no longer needs it" in cluster.log.read_text()
    cluster.wait_idle()
