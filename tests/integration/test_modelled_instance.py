"""An instance and a gateway as processes run them, with modelled steps: every token arrives."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from bench.http_load import Load, run_load
from bench.instances import FixedPlacer
from cluster.config import ClusterRef, GatewayConfig
from cluster.gateway.actor import GatewayActor
from cluster.gateway.router import Router
from instance.actor import InstanceActor
from instance.clock import RealClock
from instance.config import EngineConfig
from instance.executor import Executor, ModelDescription
from instance.model.modelled import ModelledExecutor
from instance.step_cost import StepCost
from tests.unit.byte_tokenizer import byte_tokenizer

PRINTABLE = range(32, 127)
TOKEN = "a cluster token"


def modelled(config: EngineConfig, _: object) -> Executor:
    """Steps of 2 ms that draw printable bytes: each is text of its own."""
    description = ModelDescription(
        name=config.model,
        dtype="float32",
        block_size=config.block_size,
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        vocab_size=PRINTABLE.stop,
        max_model_len=1024,
        eos_token_ids=tuple(range(PRINTABLE.start)),
    )
    cost = StepCost(0.002, 0.0, 0.0, 0.0)
    return ModelledExecutor(description, config.num_blocks, RealClock(), cost)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("model")
    PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer()).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    config = EngineConfig(model=str(folder), num_blocks=512, heartbeat=0.05)
    instance = InstanceActor("i0", config, TOKEN, executor=modelled)
    info = instance.start()

    def router(settings: GatewayConfig, _: ClusterRef) -> Router:
        placer = FixedPlacer(lambda _: "i0")
        placer.set_instances([info])
        return Router(f"g0-{uuid.uuid4().hex}", settings.token, placer)

    settings = GatewayConfig("g0", port=0, model=str(folder), token=TOKEN, drain_grace=0.0)
    gateway = GatewayActor("g0", settings, ClusterRef(), router)
    yield gateway.start()
    gateway.stop()
    left = instance.check()
    assert (left["sequences"], left["used_blocks"]) == (0, 0)
    instance.stop()


def test_same_seed_same_text(url: str) -> None:
    body = {"prompt": "abc", "max_tokens": 40, "seed": 7, "ignore_eos": True}
    first, second = (httpx.post(f"{url}/v1/completions", json=body).json() for _ in range(2))
    assert first["usage"]["completion_tokens"] == 40
    assert len(first["choices"][0]["text"]) == 40
    assert first["choices"][0]["text"] == second["choices"][0]["text"]


async def test_every_token_is_an_event(url: str) -> None:
    """Streams side by side, one request after another on each connection."""
    address = urlsplit(url)
    assert address.hostname is not None
    assert address.port is not None
    load = Load(
        address.hostname,
        address.port,
        concurrency=12,
        seconds=1.0,
        prompt=tuple(range(65, 90)),
        max_tokens=30,
        pause=0.01,
    )
    answers = await run_load(load)
    assert len(answers) >= 12
    assert len({answer.seed for answer in answers}) == len(answers)
    for answer in answers:
        # A gateway that lags behind its instance sends tokens that came together as one event.
        assert 0 < answer.events <= 30
        assert len(answer.arrivals) == answer.events
        times = [answer.sent, answer.first, *answer.arrivals, answer.last]
        assert all(soon <= late for soon, late in itertools.pairwise(times))
    assert sum(answer.events for answer in answers) > 0.5 * 30 * len(answers)


async def test_the_load_client_says_what_it_met(url: str) -> None:
    address = urlsplit(url)
    assert address.hostname is not None
    assert address.port is not None
    load = Load(address.hostname, address.port, 1, 0.2, (65,), 10**6, 0.0)
    with pytest.raises(RuntimeError, match="400"):
        await asyncio.wait_for(run_load(load), 30)
