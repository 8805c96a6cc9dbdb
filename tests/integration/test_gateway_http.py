"""The HTTP side as clients meet it: a real server, a router that plays scripts."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import logging
import re
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.gateway.auth import ApiKeys
from cluster.gateway.config import GatewayConfig
from cluster.gateway.server import GatewayServer, PortInUseError, bind, check_port_free
from cluster.gateway.stream import Delta, RequestFailed
from cluster.gateway.tokenizer import ModelTokenizer
from instance.load import MigrationReport
from instance.request import FinishReason, RequestClass
from tests.integration.gateway_fakes import (
    FakeRouter,
    Hold,
    cluster_view,
    model_tokenizer,
    text,
    tokens,
)

ADMIN_KEY = "admin-key"
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
HELLO = [{"role": "user", "content": "hi"}]


class Gateway:
    """A running server and clients of it."""

    def __init__(self, server: GatewayServer, router: FakeRouter, url: str) -> None:
        self.server = server
        self.router = router
        self.url = url
        self.http = httpx.AsyncClient(base_url=url, timeout=30)
        self.openai = self.client("none")

    def client(self, key: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30)

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.http.post(path, json=body)

    async def submitted(self, number: int = 1) -> None:
        async with asyncio.timeout(20):
            while len(self.router.streams) < number:
                self.router.arrival.clear()
                await self.router.arrival.wait()

    async def metrics(self) -> str:
        return (await self.http.get("/metrics")).text


Start = Callable[..., Coroutine[Any, Any, Gateway]]


@pytest.fixture(scope="module")
def tokenizer() -> ModelTokenizer:
    return model_tokenizer()


@pytest.fixture
async def start(tokenizer: ModelTokenizer) -> AsyncIterator[Start]:
    running: list[Gateway] = []

    async def start(
        keys: ApiKeys | None = None, model: ModelTokenizer = tokenizer, **settings: Any
    ) -> Gateway:
        config = GatewayConfig(
            "gateway-0", port=0, model="models/tiny", served_model_name="tiny",
            admin_key=ADMIN_KEY, reuse_port=False,
        )  # fmt: skip
        config = dataclasses.replace(config, **settings)
        router = FakeRouter()
        server = GatewayServer(config, router, model, keys or ApiKeys())
        gateway = Gateway(server, router, await server.start())
        running.append(gateway)
        return gateway

    yield start
    for gateway in running:
        await gateway.http.aclose()
        await gateway.openai.close()
        await gateway.server.stop(0)


@pytest.fixture
async def gateway(start: Start) -> Gateway:
    return await start()


def events(body: str) -> list[Any]:
    """Events of a stream; the closing one as the string "[DONE]"."""
    parts = body.split("\n\n")
    assert parts.pop() == ""
    assert all(part.startswith("data: ") for part in parts)
    return [
        part[6:] if part == "data: [DONE]" else json.loads(part.removeprefix("data: "))
        for part in parts
    ]


def error_of(answer: httpx.Response) -> dict[str, Any]:
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])


# ---- answers


async def test_chat(gateway: Gateway) -> None:
    gateway.router.script = lambda _: [
        tokens(b"Hel", cached=16),
        *text("lo wörld", FinishReason.STOP),
    ]
    answer = await gateway.openai.chat.completions.create(model="tiny", messages=HELLO)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello wörld")
    assert (choice.finish_reason, choice.index) == ("stop", 0)
    stream = gateway.router.last
    assert answer.id == stream.request_id
    assert re.fullmatch("chatcmpl-[0-9a-f]{32}", answer.id)
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    prompt = bytes(t for t in stream.request.prompt if t < 256)
    assert prompt == b"user\nhi\nassistant\n"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(stream.request.prompt)
    assert answer.usage.completion_tokens == len("Hello wörld".encode()) + 1
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 16
    request = stream.request
    assert (request.home, request.tenant) == ("gateway-0-1f", "default")
    assert request.request_class is RequestClass.STANDARD
    assert request.params.max_tokens == 512 - len(request.prompt)
    assert not stream.cancelled.is_set()


async def test_streamed_chat(gateway: Gateway) -> None:
    gateway.router.script = lambda _: text("Grüße 🙂!", FinishReason.LENGTH)
    stream = await gateway.openai.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert {chunk.id for chunk in chunks} == {gateway.router.last.request_id}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    *body, counts = chunks
    assert body[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in body) == "Grüße 🙂!"
    assert [chunk.choices[0].finish_reason for chunk in body][-2:] == [None, "length"]
    assert all(chunk.usage is None for chunk in body)
    assert counts.choices == []
    assert counts.usage is not None
    assert counts.usage.completion_tokens == len("Grüße 🙂!".encode())


async def test_stream_on_the_wire(gateway: Gateway) -> None:
    gateway.router.script = lambda _: text("é\n", FinishReason.STOP)
    answer = await gateway.post("/v1/completions", prompt="a", stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    first, second, last, done = events(answer.text)
    assert done == "[DONE]"
    head = {key: first[key] for key in ("id", "object", "created", "model")}
    choice = {"index": 0, "logprobs": None, "finish_reason": None}
    assert first == {**head, "choices": [{**choice, "text": "é"}]}
    assert second == {**head, "choices": [{**choice, "text": "\n"}]}
    end = {**choice, "text": "", "finish_reason": "stop", "stop_reason": None}
    assert last == {**head, "choices": [end]}
    assert head["object"] == "text_completion"


async def test_tokens_of_one_delta_are_one_event(gateway: Gateway) -> None:
    gateway.router.script = lambda _: [
        tokens(b"many"), tokens(b" tokens"), tokens(b"", FinishReason.LENGTH),
    ]  # fmt: skip
    answer = await gateway.post("/v1/completions", prompt="a", stream=True)
    assert [event["choices"][0]["text"] for event in events(answer.text)[:-1]] == [
        "many", " tokens", "",
    ]  # fmt: skip


async def test_usage_with_every_chunk(gateway: Gateway) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    answer = await gateway.post(
        "/v1/completions", prompt="abc", stream=True, stream_options=options
    )
    *chunks, last, done = events(answer.text)
    assert done == "[DONE]"
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == [1, 2, 3, 4, 5]
    assert last["usage"]["prompt_tokens"] == 3


async def test_several_prompts(gateway: Gateway) -> None:
    def script(request: Any) -> Any:
        return text(bytes(request.prompt).decode() * 2, FinishReason.LENGTH)

    gateway.router.script = script
    prompts = ["one", list(b"two"), "three"]
    answer = (await gateway.post("/v1/completions", prompt=prompts)).json()
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [
        (0, "oneone"), (1, "twotwo"), (2, "threethree"),
    ]  # fmt: skip
    assert [s.request_id for s in gateway.router.streams] == [
        f"{answer['id']}-{index}" for index in range(3)
    ]
    assert answer["usage"]["prompt_tokens"] == 11
    assert answer["usage"]["completion_tokens"] == 22
    streamed = await gateway.post("/v1/completions", prompt=prompts, stream=True)
    texts = ["", "", ""]
    ended = set()
    for event in events(streamed.text)[:-1]:
        [choice] = event["choices"]
        texts[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            ended.add(choice["index"])
    assert texts == ["oneone", "twotwo", "threethree"]
    assert ended == {0, 1, 2}


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings(gateway: Gateway, stream: bool) -> None:
    gateway.router.script = lambda _: [*text("a\nUs a\nUser: more", size=3), Hold()]
    answer = await gateway.post(
        "/v1/completions", prompt="a", stream=stream, stop=["\nUser:", "never"]
    )
    if stream:
        chunks = [event["choices"][0] for event in events(answer.text)[:-1]]
        end = chunks[-1]
        shown = "".join(chunk["text"] for chunk in chunks)
    else:
        [end] = answer.json()["choices"]
        shown = end["text"]
    assert shown == "a\nUs a"
    assert (end["finish_reason"], end["stop_reason"]) == ("stop", "\nUser:")
    assert gateway.router.last.cancelled.is_set()


async def test_a_stop_token_is_named_and_not_shown(gateway: Gateway) -> None:
    gateway.router.script = lambda _: [tokens(b"ab"), tokens(b"\n", FinishReason.STOP)]
    answer = await gateway.post("/v1/completions", prompt="a", stop_token_ids=[10])
    [choice] = answer.json()["choices"]
    assert (choice["text"], choice["stop_reason"]) == ("ab", 10)
    assert answer.json()["usage"]["completion_tokens"] == 3


async def test_characters_split_over_tokens(gateway: Gateway) -> None:
    data = "🙂é".encode() + b"\xff" + "語".encode() + b"\xe4\xbd"
    gateway.router.script = lambda _: text(data)
    answer = await gateway.post("/v1/completions", prompt="a", stream=True)
    pieces = [event["choices"][0]["text"] for event in events(answer.text)[:-1]]
    assert pieces == ["🙂", "é", "�", "語", "�"]


async def test_many_streams_at_once(gateway: Gateway) -> None:
    gateway.router.script = lambda request: text(bytes(request.prompt) * 3)

    async def one(number: int) -> None:
        stream = await gateway.openai.completions.create(
            model="tiny", prompt=f"<{number}>", stream=True
        )
        result = ""
        async for chunk in stream:
            result += chunk.choices[0].text
        assert result == f"<{number}>" * 3

    await asyncio.gather(*(one(number) for number in range(64)))
    assert gateway.router.active == 0


async def test_long_prompts_are_tokenized_off_the_loop(start: Start) -> None:
    gateway = await start(max_model_len=1 << 20)
    gateway.router.view = cluster_view("ready", context=1 << 20)
    for body in ({"prompt": "x" * 20_000}, {"prompt": ["y", "z" * 20_000]}):
        assert (await gateway.post("/v1/completions", **body)).status_code == 200
    assert len(gateway.router.last.request.prompt) == 20_000
    chat = await gateway.post(
        "/v1/chat/completions", messages=[{"role": "user", "content": "x" * 20_000}]
    )
    assert chat.json()["usage"]["prompt_tokens"] > 20_000


async def test_models_and_version(gateway: Gateway) -> None:
    [model] = (await gateway.openai.models.list()).data
    assert model.id == "tiny"
    card = (await gateway.http.get("/v1/models/tiny")).json()
    assert card["max_model_len"] == 512
    missing = await gateway.http.get("/v1/models/gpt-4")
    assert missing.status_code == 404
    assert error_of(missing)["code"] == "model_not_found"
    assert (await gateway.http.get("/version")).json()["version"]


async def test_tokenize(gateway: Gateway) -> None:
    answer = (await gateway.post("/tokenize", prompt="hé", return_token_strs=True)).json()
    assert answer["tokens"] == [104, 195, 169]
    assert (answer["count"], len(answer["token_strs"])) == (3, 3)
    chat = (await gateway.post("/tokenize", messages=HELLO)).json()
    assert chat["count"] == len(chat["tokens"]) == len(b"user\nhi\nassistant\n") + 3
    assert (await gateway.post("/tokenize")).status_code == 400


# ---- errors


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        ("completions", {"prompt": "a", "model": "gpt-4"}, 404, "model", "model_not_found"),
        ("completions", {"prompt": "a" * 512}, 400, "prompt", "context_length_exceeded"),
        ("completions", {"prompt": "a", "max_tokens": 512}, 400, "max_tokens",
         "context_length_exceeded"),
        ("completions", {"prompt": ""}, 400, "prompt", None),
        ("completions", {"prompt": ["a", ""]}, 400, "prompt", None),
        ("completions", {"prompt": [262]}, 400, "prompt", None),
        ("completions", {"prompt": [-1]}, 400, "prompt", None),
        ("completions", {}, 400, "prompt", None),
        ("completions", {"prompt": "a", "best_of": 2}, 400, "best_of", "unsupported_parameter"),
        ("completions", {"prompt": "a", "logit_bias": {"262": 1}}, 400, "logit_bias", None),
        ("chat/completions", {"messages": []}, 400, "messages", None),
        ("chat/completions", {"messages": [{"role": "user", "content": "refuse"}]}, 400,
         "messages", None),
        ("chat/completions", {"messages": HELLO, "chat_template_kwargs": {"x": 1}}, 200, None,
         None),
        ("chat/completions", {"messages": [{"role": "user", "content": "a" * 512}]}, 400,
         "messages", "context_length_exceeded"),
    ],
)  # fmt: skip
async def test_refusals(
    gateway: Gateway, stream: bool, path: str, body: Any, status: int, param: Any, code: Any
) -> None:
    answer = await gateway.post(f"/v1/{path}", **body, stream=stream)
    assert answer.status_code == status
    if status != 200:
        error = error_of(answer)
        assert (error["param"], error["code"]) == (param, code)
        assert gateway.router.streams == []


async def test_the_smallest_instance_limits_the_context(gateway: Gateway) -> None:
    gateway.router.view = cluster_view("ready", context=64)
    assert (await gateway.post("/v1/completions", prompt="a" * 48)).status_code == 200
    answer = await gateway.post("/v1/completions", prompt="a" * 64)
    assert error_of(answer)["code"] == "context_length_exceeded"


async def test_other_refusals(gateway: Gateway) -> None:
    for answer, status in (
        (await gateway.http.get("/v1/completions"), 405),
        (await gateway.http.get("/nothing"), 404),
        (await gateway.http.delete("/admin/status"), 405),
        (await gateway.http.post("/v1/completions", content=b"{"), 400),
        (await gateway.http.post("/v1/completions", content=b'{"prompt":"\\ud800"}'), 400),
    ):
        assert answer.status_code == status
        assert error_of(answer)["type"] in ("invalid_request_error", "not_found_error")
    assert (await gateway.http.get("/v1/completions")).headers["allow"] == "POST"


async def test_a_model_without_a_template(start: Start) -> None:
    gateway = await start(model=model_tokenizer(template=None))
    answer = await gateway.post("/v1/chat/completions", messages=HELLO)
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "no_template"


async def test_body_limit(start: Start) -> None:
    gateway = await start(max_request_bytes=1000)

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 100

    fits = json.dumps({"prompt": "a"}).ljust(1000)
    assert (await gateway.http.post("/v1/completions", content=fits)).status_code == 200
    for content in (b" " * 1001, parts()):  # with a Content-Length, and chunked
        answer = await gateway.http.post("/v1/completions", content=content)
        assert answer.status_code == 413
        assert error_of(answer)["code"] == "request_too_large"


async def test_a_body_that_does_not_come(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.gateway.connection.BODY_TIMEOUT", 0.05)
    reader, writer = await asyncio.open_connection(*address(gateway))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{")
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408")
    writer.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("late", [False, True])
async def test_a_failure_before_the_first_token_has_its_status(
    gateway: Gateway, stream: bool, late: bool
) -> None:
    """Never a silent or an empty 200: headers wait for the first token."""
    failure = RequestFailed(429, "the queue is full", code="queue_full", retry_after=2.5)
    if late:
        gateway.router.script = lambda _: [failure]
    else:
        gateway.router.submit_error = failure
    answer = await gateway.post("/v1/completions", prompt="a", stream=stream)
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "3"
    assert error_of(answer) == {
        "message": "the queue is full",
        "type": "rate_limit_error",
        "param": None,
        "code": "queue_full",
    }
    with pytest.raises(openai.RateLimitError):
        await gateway.openai.completions.create(model="tiny", prompt="a")


async def test_a_failure_after_the_first_token_is_an_event(gateway: Gateway) -> None:
    failure = RequestFailed(503, "no capacity is left", retry_after=1.0)
    gateway.router.script = lambda _: [tokens(b"a"), failure]
    answer = await gateway.post("/v1/completions", prompt="a", stream=True)
    assert answer.status_code == 200
    first, error = events(answer.text)
    assert first["choices"][0]["text"] == "a"
    assert error["error"]["message"] == "no capacity is left"
    stream = await gateway.openai.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError, match="no capacity is left"):
        async for _ in stream:
            pass
    whole = await gateway.post("/v1/completions", prompt="a")
    assert whole.status_code == 503


@pytest.mark.parametrize("stream", [False, True])
async def test_one_failing_prompt_fails_the_answer(gateway: Gateway, stream: bool) -> None:
    def script(request: Any) -> Any:
        if request.prompt == (98,):
            return [RequestFailed(503, "lost")]
        return [Hold()]

    gateway.router.script = script
    answer = await gateway.post("/v1/completions", prompt=["a", "b", "c"], stream=stream)
    assert answer.status_code == 503
    a, _, c = gateway.router.streams
    assert a.cancelled.is_set()
    assert c.cancelled.is_set()


@pytest.mark.parametrize("after", [0, 1])
async def test_faults_do_not_leak(
    gateway: Gateway, caplog: pytest.LogCaptureFixture, after: int
) -> None:
    gateway.router.script = lambda _: [*[tokens(b"a")] * after, RuntimeError("secret inner state")]
    with caplog.at_level(logging.ERROR):
        answer = await gateway.post("/v1/completions", prompt="a", stream=True)
    assert answer.status_code == (200 if after else 500)
    assert "secret" not in answer.text
    assert "internal server error" in answer.text
    assert "secret inner state" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
async def test_an_end_without_a_result_is_an_error(gateway: Gateway, stream: bool) -> None:
    gateway.router.script = lambda _: []
    answer = await gateway.post("/v1/completions", prompt="a", stream=stream)
    assert answer.status_code == 500
    gateway.router.script = lambda _: [Delta([], FinishReason.ERROR, "too long for the pool", 0)]
    answer = await gateway.post("/v1/completions", prompt="a", stream=stream)
    assert answer.status_code == 400
    assert error_of(answer)["message"] == "too long for the pool"


async def test_request_timeout(start: Start) -> None:
    gateway = await start(request_timeout=0.2)
    gateway.router.script = lambda _: [Hold()]
    answer = await gateway.post("/v1/completions", prompt="a", stream=True)
    assert answer.status_code == 408
    gateway.router.script = lambda _: [tokens(b"a"), Hold()]
    answer = await gateway.post("/v1/completions", prompt="a", stream=True)
    assert events(answer.text)[-1]["error"]["code"] == "request_timeout"
    assert gateway.router.active == 0


# ---- clients that go away


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
async def test_a_client_that_goes_away_cancels(gateway: Gateway, stream: bool, begun: bool) -> None:
    gateway.router.script = lambda _: [*[tokens(b"a")] * begun, Hold()]
    body = json.dumps({"prompt": ["a", "b"], "stream": stream}).encode()
    reader, writer = await asyncio.open_connection(*address(gateway))
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b"
        % (len(body), body)
    )
    await gateway.submitted(2)
    if stream and begun:
        await reader.readuntil(b'"text":"a"')
    writer.close()
    async with asyncio.timeout(20):
        for one in gateway.router.streams:
            await one.cancelled.wait()
    for _ in range(1000):
        if 'drover_client_disconnects_total{gateway="gateway-0"} 1.0' in await gateway.metrics():
            break
        await asyncio.sleep(0.01)
    else:
        pytest.fail("the disconnect was not counted")


def address(gateway: Gateway) -> tuple[str, int]:
    host, port = gateway.url.removeprefix("http://").split(":")
    return host, int(port)


async def test_an_openai_client_that_closes_its_stream(gateway: Gateway) -> None:
    gateway.router.script = lambda _: [tokens(b"a"), Hold()]
    stream = await gateway.openai.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    await anext(aiter(stream))
    await stream.close()
    async with asyncio.timeout(20):
        await gateway.router.last.cancelled.wait()


# ---- keys


async def test_api_keys(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(f"- {{key_sha256: {hashlib.sha256(b'sk-a').hexdigest()}, tenant: alpha}}\n")
    gateway = await start(keys=ApiKeys.load(file))
    for path, body in (("/v1/completions", {"prompt": "a"}), ("/tokenize", {"prompt": "a"})):
        answer = await gateway.post(path, **body)
        assert answer.status_code == 401
        assert error_of(answer)["code"] == "missing_api_key"
    with pytest.raises(openai.AuthenticationError):
        await gateway.client("sk-b").models.list()
    known = gateway.client("sk-a")
    await known.completions.create(model="tiny", prompt="a")
    assert gateway.router.last.request.tenant == "alpha"
    for open_path in ("/health", "/live", "/metrics", "/version"):
        assert (await gateway.http.get(open_path)).status_code == 200
    # A client's key opens nothing of the operators'.
    answer = await gateway.http.get("/admin/status", headers={"authorization": "Bearer sk-a"})
    assert answer.status_code == 401


async def test_admin(gateway: Gateway) -> None:
    router, http = gateway.router, gateway.http
    for headers in ({}, {"authorization": "Bearer wrong"}):
        for method, path in (("GET", "status"), ("POST", "migrate"), ("POST", "drain")):
            answer = await http.request(method, f"/admin/{path}", headers=headers)
            assert answer.status_code == 401
    assert router.calls == []

    router.answer = {"instances": [{"instance_id": "instance-0"}]}
    status = (await http.get("/admin/status", headers=ADMIN)).json()
    assert status["instances"] == router.answer["instances"]
    assert status["gateway"]["gateway_id"] == "gateway-0"
    assert (await http.get("/admin/check", headers=ADMIN)).json() == router.answer

    router.script = lambda _: [Hold()]
    running = asyncio.create_task(gateway.post("/v1/completions", prompt="a"))
    await gateway.submitted()
    listed = (await http.get("/admin/requests", headers=ADMIN)).json()["requests"]
    assert listed == [{"request_id": router.last.request_id, "instance": "instance-0"}]
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running

    router.calls.clear()
    router.answer = MigrationReport("r", "a", "instance-0", "instance-1", "admin", "moved", 2)
    body = {"request_id": "r", "destination": "instance-1"}
    report = (await http.post("/admin/migrate", json=body, headers=ADMIN)).json()
    assert (report["outcome"], report["destination"]) == ("moved", "instance-1")
    await http.post("/admin/migrate", json={"request_id": "r"}, headers=ADMIN)
    router.answer = None
    for order in ("drain", "resume"):
        answer = await http.post(
            f"/admin/{order}", json={"instance_id": "instance-0"}, headers=ADMIN
        )
        assert answer.status_code == 200
    assert router.calls == [
        ("migrate", "r", "instance-1"),
        ("migrate", "r", None),
        ("drain", "instance-0", False),
        ("resume", "instance-0"),
    ]


async def test_admin_of_the_whole_cluster(gateway: Gateway) -> None:
    router, http = gateway.router, gateway.http
    router.answer = [{"instance_id": "instance-0"}]
    assert (await http.get("/admin/instances", headers=ADMIN)).json() == {
        "instances": router.answer
    }
    router.answer = {"ok": True}
    who = {**ADMIN, "x-drover-operator": "ann"}
    for method, path, body, call in (
        ("GET", "requests?scope=cluster", None, ("requests", 256, "", "")),
        (
            "GET",
            "requests?scope=cluster&limit=5&instance_id=i&tenant=t",
            None,
            ("requests", 5, "i", "t"),
        ),
        ("GET", "tenants", None, ("tenants",)),
        (
            "PATCH",
            "tenants/a%20b",
            {"weight": 2, "max_queued": None},
            ("set_tenant", "a b", {"weight": 2.0, "max_queued": None}, "ann (127.0.0.1)"),
        ),
        ("GET", "policies", None, ("policies",)),
        (
            "PATCH",
            "policies",
            {"placement": "random", "dry_run": True},
            ("set_policies", {"placement": "random"}, True, "ann (127.0.0.1)"),
        ),
        ("POST", "role", {"instance_id": "i", "role": "decode"}, ("set_role", "i", "decode")),
        ("POST", "drain", {"instance_id": "i", "until_restart": True}, ("drain", "i", True)),
    ):
        router.calls.clear()
        answer = await http.request(method, f"/admin/{path}", json=body, headers=who)
        assert answer.status_code == 200, answer.text
        assert router.calls == [call]


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("PATCH", "tenants/a", {"weight": 0}, "weight"),
        ("PATCH", "tenants/a", {"weight": "2"}, "weight"),
        ("PATCH", "tenants/a", {"max_queued": -1}, "max_queued"),
        ("PATCH", "tenants/a", {"wieght": 1}, "wieght"),
        ("PATCH", "tenants/a", {}, None),
        ("PATCH", "policies", {"dry_run": True}, None),
        ("PATCH", "policies", {"rebalance": "on"}, "rebalance"),
        ("POST", "role", {"instance_id": "i", "role": "king"}, "role"),
        ("POST", "role", {"role": "mixed"}, "instance_id"),
        ("POST", "drain", {"instance_id": "i", "until_restart": "no idea"}, "until_restart"),
        ("GET", "requests?scope=world", None, "scope"),
        ("GET", "requests?scope=cluster&limit=-1", None, "limit"),
        ("GET", "requests?tenant=a", None, "tenant"),
    ],
)
async def test_admin_says_what_is_wrong(
    gateway: Gateway, method: str, path: str, body: Any, param: str | None
) -> None:
    answer = await gateway.http.request(method, f"/admin/{path}", json=body, headers=ADMIN)
    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert gateway.router.calls == []


class Wrapped(Exception):
    """As Ray wraps what an actor raises."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("Traceback (most recent call last): ...")
        self.cause = cause


class Coded(Exception):
    code = "unknown_request"


class Invalid(Exception):
    code = "invalid_value"
    param = "placement"


async def test_a_value_that_the_dispatcher_refuses(gateway: Gateway) -> None:
    gateway.router.answer = Wrapped(Invalid("no policy 'x'"))
    answer = await gateway.http.patch("/admin/policies", json={"placement": "x"}, headers=ADMIN)
    assert answer.status_code == 400
    assert error_of(answer) == {
        "message": "no policy 'x'",
        "type": "invalid_request_error",
        "param": "placement",
        "code": "invalid_value",
    }


class Forbidden(Exception):
    code = "forbidden"
    param = "placement"


async def test_a_file_that_the_dispatcher_does_not_load(gateway: Gateway) -> None:
    gateway.router.answer = Wrapped(Forbidden("elsewhere"))
    answer = await gateway.http.patch("/admin/policies", json={"placement": "x"}, headers=ADMIN)
    assert answer.status_code == 403
    assert error_of(answer) == {
        "message": "elsewhere",
        "type": "permission_error",
        "param": "placement",
        "code": "forbidden",
    }


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (Wrapped(Coded("nobody holds it")), 404, "r: nobody holds it"),
        (Wrapped(ValueError("no instance 'i'")), 404, "no instance 'i'"),
        (RequestFailed(503, "the dispatcher is away"), 503,
         "the dispatcher is away"),
        (ValueError("Failed to look up actor"), 503, "the dispatcher does not answer"),
        (Wrapped(RuntimeError("inner")), 500, "internal server error"),
        (RuntimeError("inner"), 500, "internal server error"),
    ],
)  # fmt: skip
async def test_admin_errors(gateway: Gateway, error: Exception, status: int, message: str) -> None:
    gateway.router.answer = error
    answer = await gateway.http.post("/admin/migrate", json={"request_id": "r"}, headers=ADMIN)
    assert answer.status_code == status
    assert error_of(answer)["message"] == message
    bad = await gateway.http.post("/admin/migrate", json={}, headers=ADMIN)
    assert error_of(bad)["param"] == "request_id"


async def test_admin_without_a_key(start: Start) -> None:
    gateway = await start(admin_key="")
    for headers in ({}, {"authorization": "Bearer"}, ADMIN):
        answer = await gateway.http.get("/admin/status", headers=headers)
        assert answer.status_code == 403


# ---- ids, health, metrics


async def test_request_ids(gateway: Gateway) -> None:
    own = await gateway.post("/v1/completions", prompt="a")
    assert own.headers["x-request-id"] == own.json()["id"] == gateway.router.last.request_id
    body = {"prompt": "a", "stream": True}
    given = await gateway.http.post(
        "/v1/completions", json=body, headers={"x-request-id": "trace-1"}
    )
    assert given.headers["x-request-id"] == "trace-1"
    assert gateway.router.last.request_id != "trace-1"
    odd = await gateway.http.post("/v1/completions", json=body, headers={"x-request-id": "a" * 129})
    assert odd.headers["x-request-id"] == gateway.router.last.request_id
    failed = await gateway.http.get("/nothing", headers={"x-request-id": "trace-2"})
    assert failed.headers["x-request-id"] == "trace-2"


async def test_health(gateway: Gateway) -> None:
    assert (await gateway.http.get("/health")).status_code == 200
    for states in ((), ("suspect", "draining")):
        gateway.router.view = cluster_view(*states)
        answer = await gateway.http.get("/health")
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert (await gateway.http.get("/live")).status_code == 200
    gateway.router.view = cluster_view("draining", "ready")
    assert (await gateway.http.get("/health")).status_code == 200


async def test_metrics(gateway: Gateway) -> None:
    gateway.router.script = lambda _: text("abc", FinishReason.STOP)
    await gateway.post("/v1/completions", prompt="12345")
    await gateway.http.get("/made/up/path")
    shown = await gateway.metrics()
    own = 'gateway="gateway-0"'
    both = f'{own},model_name="tiny"'
    for line in (
        f"vllm:prompt_tokens_total{{{both}}} 5.0",
        f"vllm:generation_tokens_total{{{both}}} 4.0",
        f'vllm:request_success_total{{finished_reason="stop",{both}}} 1.0',
        f"vllm:time_to_first_token_seconds_count{{{both}}} 1.0",
        f"vllm:inter_token_latency_seconds_count{{{both}}} 3.0",
        f"vllm:e2e_request_latency_seconds_count{{{both}}} 1.0",
        'vllm:num_requests_running{engine="instance-0",model_name="tiny"} 2.0',
        'vllm:num_requests_waiting{engine="instance-1",model_name="tiny"} 1.0',
        'vllm:kv_cache_usage_perc{engine="instance-0",model_name="tiny"} 0.25',
        'drover_instances{state="ready"} 2.0',
        f'drover_requests_total{{{own},outcome="stop"}} 1.0',
        f"drover_requests_active{{{own}}} 0.0",
        f'drover_http_requests_total{{{own},method="POST",route="/v1/completions",status="200"}} '
        "1.0",
        f'drover_http_requests_total{{{own},method="GET",route="other",status="404"}} 1.0',
    ):
        assert line in shown.splitlines()
    assert "made/up" not in shown
    assert "_created" not in shown


async def test_moves_are_counted(gateway: Gateway) -> None:
    hold = Hold()
    gateway.router.script = lambda _: [tokens(b"a"), hold, *text("b")]
    running = asyncio.create_task(gateway.post("/v1/completions", prompt="a"))
    await gateway.submitted()
    gateway.router.last.migrations, gateway.router.last.replays = 2, 1
    hold.event.set()
    await running
    shown = (await gateway.metrics()).splitlines()
    assert 'drover_request_migrations_total{gateway="gateway-0"} 2.0' in shown
    assert 'drover_request_replays_total{gateway="gateway-0"} 1.0' in shown


# ---- the server


async def test_an_orderly_stop(gateway: Gateway) -> None:
    """What can end ends; the rest is told; nothing new is taken."""
    ending, hanging = Hold(), Hold()
    scripts = [[tokens(b"a"), ending, *text("b")], [tokens(b"a"), hanging], [hanging]]
    gateway.router.script = lambda _: scripts[len(gateway.router.streams)]
    running = []
    for number in range(3):
        stream = number < 2
        running.append(
            asyncio.create_task(gateway.post("/v1/completions", prompt="a", stream=stream))
        )
        await gateway.submitted(number + 1)
    idle = await gateway.http.get("/health")
    assert idle.status_code == 200
    stopping = asyncio.create_task(gateway.server.stop(grace=0.5))
    await asyncio.sleep(0.05)
    answer = await gateway.http.get("/health")  # on the connection that is still open
    assert (answer.status_code, answer.json()["status"]) == (503, "draining")
    refused = await gateway.post("/v1/completions", prompt="a")
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    ending.event.set()
    finished, cut, whole = await asyncio.gather(*running)
    assert events(finished.text)[-1] == "[DONE]"
    assert events(cut.text)[-1]["error"]["code"] == "shutting_down"
    assert whole.status_code == 503
    await stopping
    assert all(stream.cancelled.is_set() for stream in gateway.router.streams[1:])
    with pytest.raises(httpx.ConnectError):
        await httpx.AsyncClient().get(f"{gateway.url}/live")


async def test_no_delay_on_connections(gateway: Gateway) -> None:
    await gateway.http.get("/live")
    assert gateway.server._server is not None
    connections = gateway.server._server.server_state.connections
    sockets = [c.transport.get_extra_info("socket") for c in connections]
    assert sockets
    for one in sockets:
        assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_ports() -> None:
    with bind("127.0.0.1", 0, reuse_port=True) as first:
        first.listen()
        port = first.getsockname()[1]
        with bind("127.0.0.1", port, reuse_port=True) as second:
            second.listen()  # gateways of one cluster share a port
        with pytest.raises(PortInUseError, match=f"port {port} of 127.0.0.1 is in use"):
            check_port_free("127.0.0.1", port)
    check_port_free("127.0.0.1", port)
    check_port_free("127.0.0.1", 0)


async def test_a_taken_port_is_a_clear_error(gateway: Gateway, start: Start) -> None:
    with pytest.raises(PortInUseError, match="in use by another program"):
        await start(port=address(gateway)[1])
