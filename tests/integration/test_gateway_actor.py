"""The gateway's actor in this process: start, serve, stop, and what can go wrong."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from cluster.gateway.actor import GatewayActor
from cluster.gateway.auth import KeyFileError
from cluster.gateway.config import GatewayConfig
from cluster.gateway.server import PortInUseError
from cluster.names import ClusterRef
from tests.integration.gateway_fakes import CHAT_TEMPLATE, FakeRouter
from tests.unit.byte_tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture
def actors() -> Iterator[list[GatewayActor]]:
    made: list[GatewayActor] = []
    yield made
    for actor in made:
        actor.stop()


def make(
    actors: list[GatewayActor], model: Path, **settings: Any
) -> tuple[GatewayActor, FakeRouter]:
    config = dataclasses.replace(
        GatewayConfig("gateway-0", port=0, model=str(model), drain_grace=0.0), **settings
    )
    router: Any = FakeRouter()
    actor = GatewayActor("gateway-0", config, ClusterRef(), lambda *_: router)
    actors.append(actor)
    return actor, router


def test_start_serve_stop(actors: list[GatewayActor], model: Path) -> None:
    actor, router = make(actors, model)
    url = actor.start()
    assert actor.start() == url
    body = {"messages": [{"role": "user", "content": "hi"}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert answer.json()["choices"][0]["message"]["content"] == "hello"
    # Without a served name the model is known by what it was started with.
    assert answer.json()["model"] == str(model)
    actor.stop()
    assert router.calls == [("start",), ("close",)]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/live")
    actor.stop()


def test_gateways_share_a_port(actors: list[GatewayActor], model: Path) -> None:
    first, _ = make(actors, model)
    port = int(first.start().rsplit(":", 1)[1])
    second, _ = make(actors, model, port=port)
    assert second.start() == first.start()
    first.stop()
    assert httpx.get(f"{second.start()}/live").status_code == 200


def test_what_prevents_a_start_is_said(
    actors: list[GatewayActor], model: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        actor, router = make(actors, model, port=taken.getsockname()[1])
        with pytest.raises(PortInUseError):
            actor.start()
        assert router.calls == [("start",), ("close",)]
    keys = tmp_path / "keys"
    keys.write_text("[]")
    actor, _ = make(actors, model, api_keys_file=str(keys))
    with pytest.raises(KeyFileError):
        actor.start()
