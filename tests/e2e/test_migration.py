"""Moving, killing and dropping requests on a real cluster with a float64 model: exact text."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.serving import Cluster, serve, stream_text
from tests.integration.models import make_tiny_model

pytestmark = pytest.mark.timeout(300)

LONG = 700


@pytest.fixture(scope="module")
def cluster(tiny_llama: Path) -> Iterator[Cluster]:
    with serve(
        tiny_llama,
        "--instances", "2",
        "--dtype", "float64",
        "--served-model-name", "tiny",
        "--num-gpu-blocks-override", "1024",
        "--max-num-seqs", "32",
        "--rebalance", "off",
    ) as running:  # fmt: skip
        yield running


def options(prompt: str, tokens: int = LONG, **more: Any) -> dict[str, Any]:
    extra = {"ignore_eos": True, **more.pop("extra_body", {})}
    return {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "extra_body": extra,
        **more,
    }


def moved_stream(
    cluster: Cluster, moves: int, act: Any = None, **request: Any
) -> tuple[str, list[dict[str, Any]]]:
    """Stream a completion and move it ``moves`` times on the way; its text and the reports."""
    client = cluster.client()
    text = ""
    reports: list[dict[str, Any]] = []
    for pieces, part in enumerate(client.completions.create(stream=True, **request), 1):
        text += "".join(choice.text or "" for choice in part.choices)
        # Early: a client that lags gets many tokens at a time, and the stream is finite.
        if pieces % 5 == 0 and len(reports) < moves:
            reports.append((act or cluster.migrate)(part.id))
    return text, reports


def test_a_moved_stream_has_the_same_text(cluster: Cluster) -> None:
    for request in (
        options("The quick brown fox"),
        options("A seed decides", temperature=0.9, top_p=0.95, seed=7),
        options("top k", temperature=1.2, top_k_=None, seed=11, extra_body={"top_k": 20}),
    ):
        request.pop("top_k_", None)
        # Moved first: once a prefix cache has the text, a move may find nothing left to copy.
        text, reports = moved_stream(cluster, 3, **request)
        _, unmoved, _ = stream_text(cluster.client(), **request)
        assert [report["outcome"] for report in reports] == ["moved"] * 3
        assert [report["source"] for report in reports] != [
            report["destination"] for report in reports
        ]
        assert reports[0]["bytes_copied"] > 0
        assert text == unmoved
    cluster.wait_idle()


def test_concurrent_streams_with_moves_both_ways(cluster: Cluster) -> None:
    requests = [
        options(f"Stream number {index} of many", tokens=1500, temperature=0.8, seed=index)
        for index in range(8)
    ]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        unmoved = list(
            threads.map(lambda request: stream_text(cluster.client(), **request)[1], requests)
        )

    def move(request_id: str) -> dict[str, Any]:
        # Under load one may have ended, or the others be full or slow to report, by then.
        answer = cluster.admin.post("/admin/migrate", json={"request_id": request_id})
        return dict(answer.json()) if answer.status_code == 200 else {"outcome": answer.text}

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        found = list(
            threads.map(lambda request: moved_stream(cluster, 2, move, **request), requests)
        )
    assert [text for text, _ in found] == unmoved
    outcomes = [report["outcome"] for _, reports in found for report in reports]
    assert outcomes.count("moved") >= 8, outcomes
    cluster.wait_idle()


def test_stop_string_across_tokens_and_a_move(cluster: Cluster) -> None:
    request = options("Find the stop", tokens=LONG, temperature=0.9, seed=3)
    _, whole, _ = stream_text(cluster.client(), **request)
    # Some text late in the stream, several (one-byte) tokens long, that occurs only there.
    stop = next(
        whole[at : at + 6]
        for at in range(len(whole) * 2 // 3, len(whole) - 6)
        if whole.find(whole[at : at + 6]) == at and "�" not in whole[at : at + 6]
    )
    text, reports = moved_stream(cluster, 2, stop=[stop], **request)
    assert text == whole[: whole.index(stop)]
    assert [report["outcome"] for report in reports] == ["moved"] * 2
    cluster.wait_idle()


def test_killed_instance_loses_and_doubles_nothing(cluster: Cluster) -> None:
    requests = [
        options(f"Killed {index}", tokens=1200, temperature=0.7, seed=index) for index in range(6)
    ]
    unmoved = [stream_text(cluster.client(), **request)[1] for request in requests]
    killed: list[int] = []
    first = threading.Lock()

    def kill(_: str) -> dict[str, Any]:
        with first:
            if not killed:
                killed.append(next(iter(cluster.instance_pids().values())))
                os.kill(killed[0], signal.SIGKILL)
        return {}

    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        found = list(
            threads.map(lambda request: moved_stream(cluster, 1, kill, **request), requests)
        )
    assert killed
    assert [text for text, _ in found] == unmoved

    def back() -> bool:
        instances = cluster.status()["instances"]
        return len(instances) == 2 and all(one["state"] == "ready" for one in instances)

    cluster.wait_until("the killed instance is back", back)
    assert killed[0] not in cluster.instance_pids().values()
    cluster.wait_idle()


def test_policy_moves_requests_under_skewed_load(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "tiny-qwen3", "qwen3", max_len=4096, layers=4)
    with serve(
        folder,
        "--instances", "2",
        "--dtype", "float64",
        "--served-model-name", "tiny",
        "--num-gpu-blocks-override", "640",
        "--rebalance", "on",
    ) as cluster:  # fmt: skip
        requests = [options(f"Skewed load {index}", tokens=1800) for index in range(4)]
        unmoved = [stream_text(cluster.client(), **request)[1] for request in requests]
        first, second = sorted(cluster.instance_pids())
        cluster.admin.post("/admin/drain", json={"instance_id": second}).raise_for_status()
        cluster.wait_until(
            "the drained instance gets nothing",
            lambda: any(
                one["instance_id"] == second and one["state"] == "draining"
                for one in cluster.status()["instances"]
            ),
        )
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            running = [threads.submit(stream_text, cluster.client(), **one) for one in requests]
            cluster.wait_until("all run", lambda: len(cluster.requests()) == 4)
            assert {one["instance"] for one in cluster.requests()} == {first}
            cluster.admin.post("/admin/resume", json={"instance_id": second}).raise_for_status()
            texts = [one.result()[1] for one in running]
        assert texts == unmoved
        moves = [
            one
            for one in cluster.status()["migrations"]
            if one["reason"] == "balance" and one["outcome"] == "moved"
        ]
        assert moves, cluster.status()
        cluster.wait_idle()


def test_characters_across_tokens_and_a_move(cluster: Cluster) -> None:
    """Every byte is a token here, so that characters span tokens, and moves fall into them."""
    bias = {str(byte): 40 for byte in "é世".encode()}
    for seed in range(2):
        request = options("Zeichen", temperature=1.0, seed=seed, logit_bias=bias)
        whole = cluster.client().completions.create(**request).choices[0].text
        assert {"é", "世", "\ufffd"} <= {*whole}
        text, reports = moved_stream(cluster, 3, **request)
        assert [report["outcome"] for report in reports] == ["moved"] * 3
        assert text == whole
    cluster.wait_idle()


def test_disconnects_and_aborts_leave_no_block(cluster: Cluster) -> None:
    async def drop(client: openai.AsyncOpenAI, index: int) -> None:
        stream = await client.completions.create(
            stream=True, **options(f"Dropped {index}", tokens=3000)
        )
        seen = 0
        async for part in stream:
            seen += 1
            if seen == 5 and index % 2:
                cluster.admin.post(
                    "/admin/migrate", json={"request_id": part.id, "destination": None}
                )
            if seen >= 10 + index:
                break
        await stream.close()

    async def drop_all() -> None:
        client = cluster.async_client()
        await asyncio.gather(*(drop(client, index) for index in range(6)))
        await client.close()

    asyncio.run(drop_all())
    # A client that is not streaming and gives up.
    with pytest.raises(openai.APITimeoutError):
        cluster.client(timeout=1.0).completions.create(**options("Timeout", tokens=4000))
    started = time.monotonic()
    cluster.wait_idle()
    assert not cluster.requests(), time.monotonic() - started
