"""A gateway and an instance with modelled steps, in this process, as a server runs them."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from bench.instances import FixedPlacer
from cluster.gateway.actor import GatewayActor
from cluster.gateway.config import GatewayConfig
from cluster.gateway.router import Router
from cluster.names import ClusterRef
from instance.actor import InstanceActor
from instance.clock import RealClock
from instance.config import EngineConfig
from instance.executor import Executor, ModelDescription
from instance.model.modelled import ModelledExecutor
from instance.step_cost import StepCost
from tests.unit.byte_tokenizer import byte_tokenizer

PRINTABLE = range(32, 127)
TOKEN = "a cluster token"


@contextlib.contextmanager
def modelled_gateway(folder: Path, cost: StepCost, **settings: Any) -> Iterator[str]:
    """Its URL. Each token drawn is a printable byte: text of its own.

    Args:
        folder: An empty one, for the tokenizer.
        cost: Durations of steps.
        settings: Further ones of the gateway.
    """

    def modelled(config: EngineConfig, _: object) -> Executor:
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
        return ModelledExecutor(description, config.num_blocks, RealClock(), cost)

    PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer()).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    config = EngineConfig(model=str(folder), num_blocks=512, heartbeat=0.05)
    instance = InstanceActor("i0", config, TOKEN, executor=modelled)
    info = instance.start()

    def router(settings: GatewayConfig, _: ClusterRef) -> Router:
        placer = FixedPlacer(lambda _: "i0")
        placer.set_instances([info])
        return Router(f"g0-{uuid.uuid4().hex}", settings.token, placer)

    gateway_settings = GatewayConfig(
        "g0", port=0, model=str(folder), token=TOKEN, drain_grace=0.0, **settings
    )
    gateway = GatewayActor("g0", gateway_settings, ClusterRef(), router)
    try:
        yield gateway.start()
    finally:
        gateway.stop()
        left = instance.check()
        instance.stop()
    assert (left["sequences"], left["used_blocks"]) == (0, 0)
