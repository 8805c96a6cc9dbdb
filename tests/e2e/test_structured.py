"""Output held to a grammar on a real cluster: valid, and the same when moved or replayed."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from tests.e2e.serving import Cluster, serve, stream_text

pytestmark = pytest.mark.timeout(300)

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "items": {
            "type": "array",
            "minItems": 3,
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {
                    "id": {"type": "integer", "minimum": 0, "maximum": 999},
                    "name": {"type": "string", "maxLength": 10},
                    "kind": {"enum": ["sheep", "goat", None]},
                },
                "required": ["id", "name", "kind"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["items"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "herd", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module")
def cluster(tiny_llama: Path) -> Iterator[Cluster]:
    with serve(
        tiny_llama,
        "--instances", "2",
        "--dtype", "float64",
        "--served-model-name", "tiny",
        "--num-gpu-blocks-override", "1024",
        "--rebalance", "off",
    ) as running:  # fmt: skip
        yield running


def chat(seed: int, **more: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": f"Count the flock, {seed}"}],
        "max_tokens": 3000,
        "temperature": 0.9,
        "seed": seed,
        "response_format": FORMAT,
        **more,
    }


def valid(text: str, schema: dict[str, Any] = SCHEMA) -> None:
    jsonschema.validate(json.loads(text), schema)


def disturbed(
    cluster: Cluster, act: Callable[[str], dict[str, Any]], times: int, **request: Any
) -> tuple[str, list[dict[str, Any]]]:
    """Stream a chat and ``act`` on it on the way; its text and what ``act`` returned."""
    text = ""
    reports: list[dict[str, Any]] = []
    stream = cluster.client().chat.completions.create(stream=True, **request)
    for pieces, part in enumerate(stream, 1):
        text += "".join(choice.delta.content or "" for choice in part.choices)
        if pieces % 5 == 0 and len(reports) < times:
            reports.append(act(part.id))
    return text, reports


def test_json_schema_and_every_other_kind(cluster: Cluster) -> None:
    client = cluster.client()
    answer = client.chat.completions.create(**chat(1)).choices[0]
    assert answer.finish_reason == "stop"
    valid(answer.message.content or "")
    _, text, reason = stream_text(client, **chat(1))
    assert (text, reason) == (answer.message.content, "stop")

    def complete(seed: int, extra: dict[str, Any]) -> str:
        done = client.completions.create(
            model="tiny", prompt="Speak:", max_tokens=2000, seed=seed, extra_body=extra
        )
        assert done.choices[0].finish_reason == "stop"
        return done.choices[0].text

    small = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4}
    for seed in range(3):
        valid(complete(seed, {"guided_json": small}), small)
        valid(complete(seed, {"structured_outputs": {"json": small}, "ignore_eos": True}), small)
        assert re.fullmatch(r"[a-f]{4}-\d", complete(seed, {"guided_regex": "[a-f]{4}-[0-9]"}))
        assert complete(seed, {"guided_choice": ["north", "south"]}) in ("north", "south")
        grammar = 'root ::= "(" [xyz] ("," [xyz])? ")"'
        assert re.fullmatch(r"\([xyz](,[xyz])?\)", complete(seed, {"guided_grammar": grammar}))
    cluster.wait_idle()


def test_n_choices_are_valid_each(cluster: Cluster) -> None:
    answer = cluster.client().chat.completions.create(**chat(3, n=3))
    texts = [choice.message.content or "" for choice in answer.choices]
    for text in texts:
        valid(text)
    assert len(set(texts)) == 3


def test_the_text_is_the_same_when_moved(cluster: Cluster) -> None:
    for request in (chat(11), chat(12, temperature=0.6, top_p=0.95)):
        _, unmoved, _ = stream_text(cluster.client(), **request)
        valid(unmoved)
        text, reports = disturbed(cluster, cluster.migrate, 3, **request)
        assert [report["outcome"] for report in reports] == ["moved"] * 3
        assert text == unmoved
    cluster.wait_idle()


def test_what_cannot_be_used_is_refused(cluster: Cluster) -> None:
    client = cluster.client()
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**chat(1, response_format=bad))
    assert caught.value.code == "invalid_grammar"
    assert caught.value.param == "response_format.json_schema.schema"
    assert "nonsense" in caught.value.message
    for extra in (
        {"guided_regex": "a(?=b)"},
        {"guided_grammar": "start: nowhere"},
        {"guided_regex": "a", "guided_choice": ["a"]},
    ):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="tiny", prompt="x", extra_body=extra)
    cluster.wait_idle()


def test_the_text_is_the_same_when_an_instance_is_killed(cluster: Cluster) -> None:
    request = chat(21)
    _, unmoved, _ = stream_text(cluster.client(), **request)

    def kill(request_id: str) -> dict[str, Any]:
        [holder] = [
            one["instance"] for one in cluster.requests() if one["request_id"] == request_id
        ]
        os.kill(cluster.instance_pids()[holder], signal.SIGKILL)
        return {}

    text, reports = disturbed(cluster, kill, 1, **request)
    assert reports == [{}]
    assert text == unmoved
    valid(text)
