"""Choices, log-probabilities and sampling parameters as clients of the HTTP API see them."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from cluster.gateway.auth import ApiKeys
from cluster.gateway.config import GatewayConfig
from cluster.gateway.server import GatewayServer
from cluster.gateway.stream import Delta
from instance.request import FinishReason, Request, RequestClass, TokenLogprobs
from tests.integration.gateway_fakes import FakeRouter, Step, model_tokenizer, text
from tests.unit.byte_tokenizer import EOS

HELLO: list[Any] = [{"role": "user", "content": "hi"}]


class Gateway:
    """A running server, its router and two clients of it."""

    def __init__(self, router: FakeRouter, url: str) -> None:
        self.router = router
        self.http = httpx.AsyncClient(base_url=url, timeout=30)
        self.openai = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30
        )

    async def post(self, path: str, headers: dict[str, str] | None = None, **body: Any) -> Any:
        return await self.http.post(path, json=body, headers=headers)


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    config = GatewayConfig(
        "gateway-0", port=0, model="models/tiny", served_model_name="tiny", reuse_port=False
    )
    router = FakeRouter()
    server = GatewayServer(config, router, model_tokenizer(), ApiKeys())
    running = Gateway(router, await server.start())
    yield running
    await running.http.aclose()
    await running.openai.close()
    await server.stop(0)


def scored(
    data: bytes, request: Request, finish: FinishReason = FinishReason.LENGTH, size: int = 1
) -> list[Step]:
    """Deltas of ``size`` tokens: token t has log-probability -t / 64, the likeliest are
    1, 2, ... with -1/64, -2/64, ..."""
    asked = request.params.logprobs
    found = [*data, *([EOS] if finish is FinishReason.STOP else [])]
    ids = tuple(range(1, 1 + (asked or 0)))
    figures = [] if asked is None else [
        TokenLogprobs(-token / 64, ids, tuple(-one / 64 for one in ids)) for token in found
    ]  # fmt: skip
    cuts = range(0, len(found), size)
    return [
        Delta(
            found[at : at + size],
            finish if at == cuts[-1] else FinishReason.NOT_FINISHED,
            "",
            0,
            figures[at : at + size],
        )
        for at in cuts
    ]


def events(body: str) -> list[Any]:
    parts = body.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


# ---- log-probabilities


DATA = "né🙂".encode()


async def test_chat_logprobs(gateway: Gateway) -> None:
    gateway.router.script = lambda request: scored(DATA, request, FinishReason.STOP)
    answer = await gateway.openai.chat.completions.create(
        model="tiny", messages=HELLO, logprobs=True, top_logprobs=2
    )
    [choice] = answer.choices
    assert choice.message.content == "né🙂"
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    # The token that stopped it counts and has its entry.
    assert answer.usage is not None
    assert len(content) == answer.usage.completion_tokens == len(DATA) + 1
    assert bytes(byte for one in content[:-1] for byte in one.bytes or ()) == DATA
    assert [one.token for one in content] == ["n", *["�"] * 6, "</s>"]
    assert [one.logprob for one in content] == [-token / 64 for token in (*DATA, EOS)]
    for one in content:
        found = [(top.token, top.bytes, top.logprob) for top in one.top_logprobs]
        assert found == [("\x01", [1], -1 / 64), ("\x02", [2], -2 / 64)]


@pytest.mark.parametrize("size", [1, 3])
async def test_streamed_chat_logprobs_are_those_of_the_whole(gateway: Gateway, size: int) -> None:
    gateway.router.script = lambda request: scored(DATA, request, size=size)
    body: dict[str, Any] = {"messages": HELLO, "logprobs": True, "top_logprobs": 3}
    whole = (await gateway.post("/v1/chat/completions", **body)).json()["choices"][0]
    streamed = await gateway.post("/v1/chat/completions", **body, stream=True)
    chunks = [event["choices"][0] for event in events(streamed.text)]
    assert chunks[0]["delta"]["role"] == "assistant"
    found = [chunk["logprobs"]["content"] for chunk in chunks[1:]]
    # One event for what came together, also where no character is complete.
    assert [len(entries) for entries in found] == [size] * (7 // size) + [1] * (7 % size)
    assert [one for entries in found for one in entries] == whole["logprobs"]["content"]
    assert "".join(chunk["delta"]["content"] for chunk in chunks) == "né🙂"
    assert chunks[-1]["finish_reason"] == "length"


async def test_completion_logprobs(gateway: Gateway) -> None:
    gateway.router.script = lambda request: scored(b"ab" + "é".encode() + b"\x01", request)
    answer = await gateway.openai.completions.create(model="tiny", prompt="p", logprobs=2)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens == ["a", "b", "�", "�", "\x01"]
    assert found.token_logprobs == [-97 / 64, -98 / 64, -195 / 64, -169 / 64, -1 / 64]
    assert found.text_offset == [0, 1, 2, 2, 3]
    assert found.top_logprobs is not None
    # The token drawn is there too where it is not among the likeliest.
    assert found.top_logprobs[0] == {"a": -97 / 64, "\x01": -1 / 64, "\x02": -2 / 64}
    assert found.top_logprobs[4] == {"\x01": -1 / 64, "\x02": -2 / 64}
    alone = await gateway.openai.completions.create(model="tiny", prompt="p", logprobs=0)
    assert alone.choices[0].logprobs is not None
    assert (alone.choices[0].logprobs.top_logprobs or [])[0] == {"a": -97 / 64}


async def test_streamed_completion_logprobs_are_those_of_the_whole(gateway: Gateway) -> None:
    gateway.router.script = lambda request: scored(DATA, request, size=2)
    body = {"prompt": "p", "logprobs": 1}
    whole = (await gateway.post("/v1/completions", **body)).json()["choices"][0]["logprobs"]
    streamed = await gateway.post("/v1/completions", **body, stream=True)
    parts = [event["choices"][0]["logprobs"] for event in events(streamed.text)]
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [one for part in parts for one in part[key]] == whole[key]


async def test_no_logprobs_unless_asked_for(gateway: Gateway) -> None:
    gateway.router.script = lambda request: scored(b"ab", request)
    for path, body in (("chat/completions", {"messages": HELLO}), ("completions", {"prompt": "p"})):
        answer = (await gateway.post(f"/v1/{path}", **body)).json()
        assert answer["choices"][0]["logprobs"] is None
        assert gateway.router.last.request.params.logprobs is None


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_end_with_a_stop_string(gateway: Gateway, stream: bool) -> None:
    """Tokens after it have none: they do not count."""
    gateway.router.script = lambda request: scored(b"abXYcd", request, size=6)
    answer = await gateway.post(
        "/v1/completions", prompt="p", logprobs=0, stop=["XY"], stream=stream
    )
    choice = (events(answer.text)[-1] if stream else answer.json())["choices"][0]
    assert (choice["text"], choice["logprobs"]["tokens"]) == ("ab", ["a", "b", "X", "Y"])


async def test_impossible_tokens_have_a_number(gateway: Gateway) -> None:
    figures = TokenLogprobs(-0.5, (97, 98), (-0.5, -math.inf))
    gateway.router.script = lambda _: [Delta([97], FinishReason.LENGTH, "", 0, [figures])]
    answer = (await gateway.post("/v1/completions", prompt="p", logprobs=2)).json()
    assert answer["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -0.5, "b": -9999.0}]


# ---- choices


async def test_choices_are_requests_with_seeds_of_their_own(gateway: Gateway) -> None:
    def script(request: Request) -> list[Step]:
        return text(f"seed {request.params.seed}")

    gateway.router.script = script
    answer = await gateway.openai.chat.completions.create(
        model="tiny", messages=HELLO, n=3, seed=(1 << 63) - 1
    )
    expected = [f"seed {(1 << 63) - 1 + index}" for index in range(3)]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == expected
    prompt = len(gateway.router.last.request.prompt)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == prompt
    assert answer.usage.completion_tokens == sum(map(len, expected))
    assert [one.request_id for one in gateway.router.streams] == [
        f"{answer.id}-{index}" for index in range(3)
    ]
    await gateway.post("/v1/completions", prompt="a", n=2, seed=-1)
    assert [one.request.params.seed for one in gateway.router.streams[3:]] == [(1 << 64) - 1, 0]


async def test_choices_of_several_prompts(gateway: Gateway) -> None:
    def script(request: Request) -> list[Step]:
        return text(f"{bytes(request.prompt).decode()}{request.params.seed}")

    gateway.router.script = script
    answer = (await gateway.post("/v1/completions", prompt=["a", "bc"], n=2, seed=5)).json()
    assert [(one["index"], one["text"]) for one in answer["choices"]] == [
        (0, "a5"), (1, "a6"), (2, "bc5"), (3, "bc6"),
    ]  # fmt: skip
    assert answer["usage"] == {
        "prompt_tokens": 3, "completion_tokens": 10, "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip


async def test_streamed_choices(gateway: Gateway) -> None:
    gateway.router.script = lambda request: scored(f"{request.params.seed}!".encode(), request)
    stream = await gateway.openai.chat.completions.create(
        model="tiny", messages=HELLO, n=4, seed=6, stream=True, logprobs=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    texts, entries = [""] * 4, [0] * 4
    reasons: dict[int, str] = {}
    usage = None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            entries[choice.index] += len((choice.logprobs and choice.logprobs.content) or ())
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == ["6!", "7!", "8!", "9!"]
    assert entries == [2] * 4
    assert reasons == dict.fromkeys(range(4), "length")
    assert usage is not None
    assert usage.prompt_tokens == len(gateway.router.last.request.prompt)
    assert usage.completion_tokens == 8


# ---- the rest


async def test_sampling_parameters_reach_the_instance(gateway: Gateway) -> None:
    await gateway.openai.chat.completions.create(
        model="tiny",
        messages=HELLO,
        presence_penalty=0.5,
        frequency_penalty=-0.25,
        logit_bias={"10": 5, "3": -100},
        max_completion_tokens=7,
        user="someone",
        extra_body={"repetition_penalty": 1.5, "min_p": 0.1, "min_tokens": 2, "ignore_eos": True},
        extra_headers={
            "x-session-id": "s",
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        },
    )
    params = gateway.router.last.request.params
    assert (params.presence_penalty, params.frequency_penalty) == (0.5, -0.25)
    assert (params.repetition_penalty, params.min_p, params.min_tokens) == (1.5, 0.1, 2)
    assert params.logit_bias == ((3, -100.0), (10, 5.0))
    assert (params.max_tokens, params.ignore_eos, params.logprobs) == (7, True, None)


@pytest.mark.parametrize("stream", [False, True])
async def test_echo(gateway: Gateway, stream: bool) -> None:
    gateway.router.script = lambda _: text("wörld", size=2)
    answer = await gateway.post(
        "/v1/completions", prompt=["héllo ", list(b"hi ")], echo=True, stream=stream
    )
    texts = ["", ""]
    for event in events(answer.text) if stream else [answer.json()]:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == ["héllo wörld", "hi wörld"]
    refused = await gateway.post("/v1/completions", prompt="a", echo=True, logprobs=1)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "echo"


async def test_detokenize(gateway: Gateway) -> None:
    given = "hé</s>🙂"
    tokens = (await gateway.post("/tokenize", prompt=given)).json()["tokens"]
    assert EOS in tokens
    answer = await gateway.post("/detokenize", model="tiny", tokens=tokens)
    assert answer.json() == {"prompt": given}
    assert (await gateway.post("/detokenize", tokens=[])).json() == {"prompt": ""}
    for wrong in ([262], [-1], "a", None):
        assert (await gateway.post("/detokenize", tokens=wrong)).status_code == 400


async def test_classes(gateway: Gateway) -> None:
    for headers, priority, expected in (
        ({}, 0, RequestClass.STANDARD),
        ({}, 5, RequestClass.BATCH),
        ({"x-drover-class": "interactive"}, 5, RequestClass.INTERACTIVE),
        ({"x-drover-class": "Batch"}, None, RequestClass.BATCH),
    ):
        await gateway.post("/v1/completions", headers=headers, prompt="a", priority=priority)
        assert gateway.router.last.request.request_class is expected
    refused = await gateway.post("/v1/completions", headers={"x-drover-class": "vip"}, prompt="a")
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "x-drover-class"


async def test_tools_are_refused_unless_they_are_not_to_be_called(gateway: Gateway) -> None:
    tools: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with pytest.raises(openai.BadRequestError, match="function calling is not supported"):
        await gateway.openai.chat.completions.create(model="tiny", messages=HELLO, tools=tools)
    answer = await gateway.openai.chat.completions.create(
        model="tiny", messages=HELLO, tools=tools, tool_choice="none"
    )
    assert answer.choices[0].message.content == "hello"
