"""Sampling parameters, log-probabilities and choices on a real cluster, also of moved requests."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import Cluster, serve

pytestmark = pytest.mark.timeout(300)

LONG = 1200


@pytest.fixture(scope="module")
def cluster(tiny_llama: Path) -> Iterator[Cluster]:
    with serve(
        tiny_llama,
        "--instances", "2",
        "--dtype", "float64",
        "--served-model-name", "tiny",
        "--num-gpu-blocks-override", "512",
        "--rebalance", "off",
    ) as running:  # fmt: skip
        yield running


def request(prompt: str, **more: Any) -> dict[str, Any]:
    extra = {"ignore_eos": True, **more.pop("extra_body", {})}
    return {"model": "tiny", "prompt": prompt, "max_tokens": LONG, "extra_body": extra, **more}


KEYS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


def answer(cluster: Cluster, **options: Any) -> tuple[str, dict[str, list[Any]]]:
    """Text and log-probabilities of a completion that is not streamed."""
    choice = cluster.client().completions.create(**options).choices[0]
    found = choice.logprobs
    return choice.text, {key: list(getattr(found, key, None) or []) for key in KEYS}


def streamed(
    cluster: Cluster, act: Callable[[str], Any], times: int, **options: Any
) -> tuple[str, dict[str, list[Any]]]:
    """The same of a streamed one, for which ``act`` is called ``times`` on the way."""
    text, done = "", 0
    found: dict[str, list[Any]] = {key: [] for key in KEYS}
    stream = cluster.client().completions.create(stream=True, **options)
    for pieces, part in enumerate(stream, 1):
        for choice in part.choices:
            text += choice.text or ""
            for key in KEYS:
                found[key] += getattr(choice.logprobs, key, None) or []
        # Early: a client that lags gets many tokens at a time, and the stream is finite.
        if pieces % 5 == 0 and done < times:
            act(part.id)
            done += 1
    assert done == times
    return text, found


PENALTIES: dict[str, Any] = {
    "temperature": 0.9,
    "top_p": 0.95,
    "presence_penalty": 0.7,
    "frequency_penalty": 0.3,
    "extra_body": {"repetition_penalty": 1.1},
    # The letter e never, the letter t often.
    "logit_bias": {"101": -100, "116": 3},
}


@pytest.mark.parametrize("sampling", [{"temperature": 0}, PENALTIES], ids=["greedy", "penalties"])
def test_moves_change_neither_text_nor_logprobs(cluster: Cluster, sampling: dict[str, Any]) -> None:
    options = request("Moved with its figures", seed=5, logprobs=4, **sampling)
    unmoved = answer(cluster, **options)
    outcomes: list[str] = []

    def move(request_id: str) -> None:
        outcomes.append(cluster.migrate(request_id)["outcome"])

    moved = streamed(cluster, move, 4, **options)
    assert outcomes == ["moved"] * 4
    assert moved == unmoved
    assert [len(unmoved[1][key]) for key in KEYS] == [LONG] * 4
    cluster.wait_idle()


def test_penalties_do_what_they_say(cluster: Cluster) -> None:
    plain, _ = answer(cluster, **request("Say it", seed=5, temperature=0.9))
    text, _ = answer(cluster, **request("Say it", seed=5, **PENALTIES))
    assert "e" in plain
    assert "e" not in text
    assert text.count("t") > plain.count("t")
    one = request("Once each", max_tokens=60, temperature=0, frequency_penalty=2)
    once, _ = answer(cluster, **one, presence_penalty=2)
    again, _ = answer(cluster, **request("Once each", max_tokens=60, temperature=0))
    assert len(set(once)) > len(set(again))


def test_choices(cluster: Cluster) -> None:
    """Choice k is what a request of its own with seed + k would get."""
    client = cluster.client()
    options: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Several, please"}],
        "max_tokens": 40,
        "temperature": 1.0,
        "logprobs": True,
        "top_logprobs": 2,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.chat.completions.create(n=3, seed=11, **options)
    singles = [client.chat.completions.create(seed=11 + k, **options) for k in range(3)]
    texts = [choice.message.content for choice in whole.choices]
    assert texts == [one.choices[0].message.content for one in singles]
    assert len(set(texts)) == 3
    assert [c.logprobs for c in whole.choices] == [one.choices[0].logprobs for one in singles]
    assert whole.usage is not None
    assert singles[0].usage is not None
    assert whole.usage.prompt_tokens == singles[0].usage.prompt_tokens
    assert whole.usage.completion_tokens == 120
    parts = ["", "", ""]
    for chunk in client.chat.completions.create(n=3, seed=11, stream=True, **options):
        for choice in chunk.choices:
            parts[choice.index] += choice.delta.content or ""
    assert parts == texts
    cluster.wait_idle()


def test_the_drawn_token_is_the_likeliest_when_greedy(cluster: Cluster) -> None:
    _, found = answer(cluster, **request("Greedy", temperature=0, logprobs=3, max_tokens=30))
    for logprob, top in zip(found["token_logprobs"], found["top_logprobs"], strict=True):
        assert logprob == max(top.values()) <= 0
        assert len(top) == 3


def test_a_replay_keeps_penalties_and_logprobs(cluster: Cluster) -> None:
    """The instance that runs the request is killed: another goes on from the emitted tokens."""
    options = request("Killed on the way", seed=9, logprobs=2, **PENALTIES)
    undisturbed = answer(cluster, **options)

    def kill(request_id: str) -> None:
        [held] = [one for one in cluster.requests() if one["request_id"] == request_id]
        os.kill(cluster.instance_pids()[held["instance"]], signal.SIGKILL)

    assert streamed(cluster, kill, 1, **options) == undisturbed
    cluster.wait_until(
        "both instances are ready",
        lambda: [one["state"] for one in cluster.status()["instances"]] == ["ready"] * 2,
    )
    cluster.wait_idle()
