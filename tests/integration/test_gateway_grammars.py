"""A gateway tries grammars out in processes that it can kill."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator

import httpx
import psutil
import pytest
import pytest_asyncio

from cluster.gateway import grammar_check
from cluster.gateway.auth import ApiKeys
from cluster.gateway.config import GatewayConfig
from cluster.gateway.errors import ApiError
from cluster.gateway.grammar_check import GrammarChecker
from cluster.gateway.server import GatewayServer
from cluster.gateway.structured import Constraint
from instance.model.grammar_text import MAX_SPEC_CHARS
from instance.request import Grammar, GrammarKind
from tests.integration.gateway_fakes import FakeRouter, model_tokenizer

HOSTILE = json.dumps(
    {"allOf": [{"type": "string", "pattern": f"^(a|b)*a(a|b){{{n}}}$"} for n in range(5, 45)]}
)
"""Whether any text matches is not decided within hours."""


def constraint(spec: str, kind: GrammarKind = GrammarKind.JSON_SCHEMA) -> Constraint:
    return Constraint(Grammar(kind, spec), "guided")


def workers() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if child.status() != psutil.STATUS_ZOMBIE
        and "cluster.gateway.grammar_worker" in child.cmdline()
    ]


@pytest_asyncio.fixture
async def checker() -> AsyncIterator[GrammarChecker]:
    made = GrammarChecker(cpu_seconds=1)
    yield made
    await asyncio.to_thread(made.close)
    assert workers() == []


async def refusal(checker: GrammarChecker, given: Constraint) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await checker.check(given)
    return caught.value


async def test_good_ones_pass_and_bad_ones_say_why(checker: GrammarChecker) -> None:
    for _ in range(2):  # tried out, then known
        await checker.check(constraint('{"type": "object"}'))
        error = await refusal(checker, constraint('{"type": "foo"}'))
        assert (error.status, error.param, error.code) == (400, "guided", "invalid_grammar")
        assert "foo" in error.message
    assert len(workers()) == 1
    error = await refusal(checker, constraint("a" * (MAX_SPEC_CHARS + 1), GrammarKind.REGEX))
    assert "at most" in error.message


async def test_one_that_never_ends_is_ended(checker: GrammarChecker) -> None:
    hostile = asyncio.create_task(refusal(checker, constraint(HOSTILE)))
    same = asyncio.create_task(refusal(checker, constraint(HOSTILE)))
    # Others are served meanwhile.
    await checker.check(constraint("[0-9]", GrammarKind.REGEX))
    for task in (hostile, same):
        error = await task
        assert error.status == 400
        assert "too complex" in error.message
    await checker.check(constraint("[0-9]+", GrammarKind.REGEX))


async def test_a_worker_that_died_is_replaced(checker: GrammarChecker) -> None:
    await checker.check(constraint("a", GrammarKind.REGEX))
    [worker] = workers()
    os.kill(worker.pid, signal.SIGKILL)
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        await asyncio.sleep(0.01)
    await checker.check(constraint("b", GrammarKind.REGEX))


async def test_closing_ends_a_worker_at_work(checker: GrammarChecker) -> None:
    task = asyncio.create_task(checker.check(constraint(HOSTILE)))
    while not workers():
        await asyncio.sleep(0.01)
    await asyncio.to_thread(checker.close)
    with pytest.raises(ApiError):
        await task
    assert workers() == []


async def test_too_many_at_a_time_are_refused(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_check, "MAX_WAITING", 2)
    tasks = [
        asyncio.create_task(checker.check(constraint(f"a{n}", GrammarKind.REGEX))) for n in range(3)
    ]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert results[:2] == [None, None]
    refused = results[2]
    assert isinstance(refused, ApiError)
    assert refused.status == 503
    await checker.check(constraint("a2", GrammarKind.REGEX))


async def test_a_request_carries_its_grammar_or_is_refused() -> None:
    config = GatewayConfig(
        "gateway-0", port=0, model="models/tiny", served_model_name="tiny", reuse_port=False
    )
    router = FakeRouter()
    server = GatewayServer(config, router, model_tokenizer(), ApiKeys())
    schema = {"type": "object", "properties": {"a": {"type": "null"}}}
    body = {"messages": [{"role": "user", "content": "hi"}], "n": 2}

    def asked(schema: object) -> dict[str, object]:
        return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}

    try:
        async with httpx.AsyncClient(base_url=await server.start(), timeout=60) as http:
            path = "/v1/chat/completions"
            good = await http.post(path, json={**body, "response_format": asked(schema)})
            assert good.status_code == 200
            spec = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema, separators=(",", ":")))
            assert [one.request.params.grammar for one in router.streams] == [spec, spec]
            bad = await http.post(path, json={**body, "response_format": asked({"type": "x"})})
            assert bad.status_code == 400
            error = bad.json()["error"]
            assert error["type"] == "invalid_request_error"
            assert error["param"] == "response_format.json_schema.schema"
            assert error["code"] == "invalid_grammar"
            assert len(router.streams) == 2
    finally:
        await server.stop(0)
    assert workers() == []
