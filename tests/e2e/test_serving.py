"""``drover serve smollm2`` as a user starts it: sensible answers, moves, a clean end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.e2e.serving import ADMIN_KEY, Cluster, metric, process_tree, serve, stream_text

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with serve(
        "smollm2", "--instances", "2", "--gateways", "2", "--dtype", "float32",
        "--kv-cache-memory-bytes", "512M", "--rebalance", "off",
    ) as running:  # fmt: skip
        yield running


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {
        "model": "smollm2",
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 64,
        **more,
    }


def test_answers_sensibly(cluster: Cluster) -> None:
    answer = cluster.client().chat.completions.create(**chat("What is the capital of France?"))
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 3


def test_models_health_and_version(cluster: Cluster) -> None:
    assert [model.id for model in cluster.client().models.list()] == ["smollm2"]
    assert httpx.get(f"{cluster.url}/health").status_code == 200
    assert httpx.get(f"{cluster.url}/live").status_code == 200
    assert httpx.get(f"{cluster.url}/version").json()["version"]


def test_errors_have_the_openai_shape(cluster: Cluster) -> None:
    client = cluster.client()
    with pytest.raises(openai.NotFoundError, match="nonesuch"):
        client.chat.completions.create(**chat("hello", model="nonesuch"))
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="smollm2", prompt=[5] * 9000, max_tokens=4)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(**chat("hello", temperature=-1))
    admin = httpx.get(f"{cluster.url}/admin/status", headers={"authorization": "Bearer wrong"})
    assert admin.status_code == 401
    assert admin.json()["error"]["message"]


def test_moved_chat_says_the_same(cluster: Cluster) -> None:
    """Text after a move equals the unmoved one, by the margin rule of float32."""
    request = chat("Write three sentences about mountains.", max_tokens=80)
    _, unmoved, _ = stream_text(cluster.client(), **request)
    text, moved, count = "", False, 0
    for chunk in cluster.client().chat.completions.create(stream=True, **request):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            count += 1
        if count == 12 and not moved:
            report = cluster.migrate(chunk.id)
            assert report["outcome"] == "moved"
            moved = True
    assert moved
    if text != unmoved:
        assert_near_tie(request, unmoved, text)
    cluster.wait_idle()
    # The gateways share the port: ask until the one that served the chat answers.
    for _ in range(50):
        exposed = httpx.get(f"{cluster.url}/metrics").text
        assert "vllm:num_requests_running" in exposed
        if metric(exposed, "drover_request_migrations_total"):
            break
    else:
        pytest.fail("no gateway counts the migration")


def assert_near_tie(request: dict[str, Any], one: str, other: str) -> None:
    """The first divergence must be a near tie (margin below 1e-3) in float64."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from instance.model.loader import resolve_model

    folder = resolve_model("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    head = tokenizer.apply_chat_template(
        request["messages"], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    first, second = (tokenizer.encode(text, add_special_tokens=False) for text in (one, other))
    at = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.inference_mode():
        logits = model(torch.tensor([head + first[:at]])).logits[0, -1]
    top = logits.topk(2).values
    assert float(top[0] - top[1]) < 1e-3, f"diverged at token {at}: {one!r} and {other!r}"


def test_cli_status_and_migrate(cluster: Cluster) -> None:
    def drover(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cluster.cli", *words],
            capture_output=True,
            text=True,
            timeout=60,
        )

    status = drover("status", "--url", cluster.url, "--admin-key", ADMIN_KEY)
    assert status.returncode == 0, status.stderr
    assert "ready" in status.stdout
    unknown = drover("migrate", "nonesuch", "--url", cluster.url, "--admin-key", ADMIN_KEY)
    assert unknown.returncode == 1
    assert "nonesuch" in unknown.stderr
    version = drover("--version")
    assert version.returncode == 0
    assert version.stdout.startswith("drover ")
    assert drover("serve", "--no-such-flag").returncode == 2


def test_ctrl_c_leaves_nothing_behind() -> None:
    before = set(os.listdir("/dev/shm"))
    with serve("smollm2", "--instances", "1", "--kv-cache-memory-bytes", "64M") as running:
        family = process_tree(running.process.pid)
        assert len(family) > 3
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(40) in (0, 130)
        _, alive = psutil.wait_procs(family, timeout=15)
        assert not alive
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", running.port))
        assert not set(os.listdir("/dev/shm")) - before
