"""Constrained requests move and are replayed between two instances that run a real model."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import jsonschema
import pytest

from cluster.gateway.stream import Delta, RequestStream
from instance.config import EngineConfig
from instance.model import grammar as grammar_module
from instance.model.runner import TorchExecutor
from instance.request import FinishReason, Grammar, GrammarKind, Request, SamplingParams
from instance.server import InstanceServer
from tests.integration.models import make_tiny_model
from tests.integration.test_server import CONFIG, TOKEN, Servers, read

SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"id": {"type": "integer", "maximum": 99}, "ok": {"type": "boolean"}},
        "required": ["id", "ok"],
        "additionalProperties": False,
    },
    "minItems": 12,
    "maxItems": 12,
}
LIST = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))


class ModelServers(Servers):
    """Instances that run one tiny model in float64."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.config: EngineConfig = dataclasses.replace(
            CONFIG, model=str(folder), dtype="float64", block_size=4, num_blocks=400
        )

    async def start(self, name: str) -> InstanceServer:
        executor = TorchExecutor(self.config)
        server = InstanceServer(name, f"{name}-inc", executor, self.config, TOKEN)
        await server.start()
        self.instances[name] = server
        infos = [one.info for one in self.instances.values() if one.info is not None]
        self.placer.set_instances(infos)
        await asyncio.wait_for(self.router.wait_connected(len(infos)), 10)
        return server

    def ask(self, where: str, grammar: Grammar = LIST) -> RequestStream:
        request_id = f"r{next(self._numbers)}"
        self.pinned[request_id] = where
        params = SamplingParams(seed=7, temperature=0.8, max_tokens=1500, grammar=grammar)
        return self.router.submit(
            Request(request_id, (70, 71, 72), params, home="home", tenant="t")
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "m", "llama")


@pytest.fixture
async def servers(folder: Path) -> AsyncIterator[ModelServers]:
    made = ModelServers(folder)
    await made.router.start()
    yield made
    await made.router.close()
    for server in made.instances.values():
        await server.stop()


def valid(output: list[int]) -> None:
    assert output[-1] in (257, 259)
    jsonschema.validate(json.loads(bytes(output[:-1])), SCHEMA)


async def test_a_move_into_a_cold_instance_changes_nothing(servers: ModelServers) -> None:
    await servers.start("a")
    await servers.start("b")
    want = await read(servers.ask("a"))
    valid(want)
    stream = servers.ask("a")
    tokens: list[int] = []
    for until, to in ((10, "b"), (50, "a"), (20, "b")):
        tokens += await read(stream, until)
        assert (await servers.move(stream, to)).outcome == "moved"
    assert tokens + await read(stream) == want
    await servers.idle()


async def test_a_replay_after_a_death_changes_nothing(servers: ModelServers) -> None:
    dying = await servers.start("a")
    await servers.start("b")
    want = await read(servers.ask("a"))
    stream = servers.ask("a")
    tokens = await read(stream, 40)
    servers.pinned[stream.request_id] = "b"
    del servers.instances["a"]
    await dying.stop()
    assert tokens + await read(stream) == want
    assert stream.replays == 1
    await servers.idle()


async def test_a_move_does_not_wait_for_the_compilation_there(
    servers: ModelServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await servers.start("a")
    await servers.start("b")
    want = await read(servers.ask("a"))
    stream = servers.ask("a")
    tokens = await read(stream, 10)
    release = threading.Event()
    definition = grammar_module.definition

    def slow(grammar: Grammar) -> str:
        assert release.wait(60)
        return definition(grammar)

    monkeypatch.setattr(grammar_module, "definition", slow)
    try:
        assert (await servers.move(stream, "b")).outcome == "moved"
        [held] = servers.instances["b"].engine.scheduler.sequences.values()
        assert held.held
        # It may even move on, or back, before it has run there.
        assert (await servers.move(stream, "a")).outcome == "moved"
        assert (await servers.move(stream, "b")).outcome == "moved"
    finally:
        release.set()
    assert tokens + await read(stream) == want
    await servers.idle()


async def test_a_grammar_that_does_not_compile_ends_with_the_reason(servers: ModelServers) -> None:
    await servers.start("a")
    bad = servers.ask("a", Grammar(GrammarKind.REGEX, "["))
    good = servers.ask("a")
    deltas: list[Delta] = [delta async for delta in bad]
    assert [delta.finish_reason for delta in deltas] == [FinishReason.ERROR]
    assert "the grammar cannot be used" in deltas[0].message
    valid(await read(good))
    await servers.idle()
