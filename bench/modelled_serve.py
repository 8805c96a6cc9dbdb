"""``drover`` whose instances only take the time of steps: real in all else, on few cores.

Steps cost what ``drover calibrate --url`` found for SmolLM2-135M in bfloat16, two instances of one
thread on a machine of two cores. Nothing is computed and KV has no bytes, so that instances do not
compete for cores with each other, nor with gateway, dispatcher and client.

    python -m bench.modelled_serve serve smollm2 --num-gpu-blocks-override 512
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from cluster import cli, fleet
from cluster.reporter import DispatcherReporter
from instance.config import EngineConfig
from instance.executor import Executor, ModelDescription
from instance.step_cost import StepCost

COST = StepCost(
    base=0.025,
    prefill_token=8e-4,
    decode_sequence=7e-4,
    context_token=1e-5,
    prefill_context=4e-7,
)
VOCABULARY, END = 49152, 2
"""Size, and the token that ends an answer."""


def modelled(config: EngineConfig, _: Callable[[str], None]) -> Executor:
    """An executor with the shape of SmolLM2-135M."""
    from instance.clock import RealClock
    from instance.model.modelled import ModelledExecutor

    description = ModelDescription(
        name=config.model,
        dtype="bfloat16",
        block_size=config.block_size,
        num_layers=30,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=VOCABULARY,
        max_model_len=config.scheduler.max_model_len,
        eos_token_ids=(END,),
    )
    return ModelledExecutor(description, config.num_blocks, RealClock(), COST)


class ModelledProcess(fleet.InstanceProcess):
    """An instance that loads no model."""

    def __init__(
        self,
        instance_id: str,
        config: EngineConfig,
        token: str,
        host: str | Callable[[], str],
        reporter: DispatcherReporter,
    ) -> None:
        from instance.actor import InstanceActor

        self._actor = InstanceActor(instance_id, config, token, host, reporter, modelled)


if __name__ == "__main__":
    from bench import modelled_serve

    # By the name under which other processes can import it.
    fleet.InstanceProcess = modelled_serve.ModelledProcess  # type: ignore[misc]
    sys.exit(cli.main())
