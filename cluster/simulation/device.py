"""What a simulated instance runs on, made from a cost profile."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from cluster.simulation.network import KvLink
from cluster.simulation.profile import CostProfile
from cluster.simulation.scatter import Scatter
from instance.clock import Clock
from instance.executor import ModelDescription
from instance.model.modelled import ModelledExecutor
from instance.model.modelled_copier import ModelledCopier
from instance.step_cost import StepCost


@dataclass(frozen=True, slots=True)
class DeviceModel:
    """A device in one life of an instance.

    Attributes:
        executor: Model, KV pool and, where there is a host pool, its copier.
        cost: Durations of steps.
        scatter: How they scatter; None: not at all.
        link: The way out for KV.
        block_bytes: Bytes of a KV block.
    """

    executor: ModelledExecutor
    cost: StepCost
    scatter: Scatter | None
    link: KvLink
    block_bytes: int


DeviceMaker = Callable[[Clock], DeviceModel]


def vocabulary(model: ModelDescription) -> tuple[range, int]:
    """Ids of ordinary tokens, and the one that ends an answer.

    Raises:
        ValueError: The model has no end-of-sequence token, or no other.
    """
    ends = sorted(model.eos_token_ids)
    if not ends:
        raise ValueError(f"{model.name} has no end-of-sequence token: no answer could end")
    borders = [-1, *ends, model.vocab_size]
    widest = max((range(low + 1, high) for low, high in itertools.pairwise(borders)), key=len)
    if not widest:
        raise ValueError(f"{model.name} has nothing but end-of-sequence tokens")
    return widest, ends[0]


def device(profile: CostProfile, share: float, host_bytes: float = 0.0) -> DeviceMaker:
    """Makes the device of a profile.

    Args:
        share: Bytes per second that migrations may send beside decoding; 0 is unlimited.
        host_bytes: Host memory for KV at most; the profile may have less.
    """
    block_bytes = profile.block_bytes
    host_blocks = int(min(profile.num_host_blocks, host_bytes // block_bytes))

    def make(clock: Clock) -> DeviceModel:
        copier = None
        if host_blocks:
            copier = ModelledCopier(
                host_blocks + 1,
                block_bytes,
                clock,
                profile.copy_out.seconds,
                profile.copy_in.seconds,
            )
        executor = ModelledExecutor(
            profile.model, profile.num_blocks + 1, clock, profile.step, copier
        )
        link = KvLink(profile.link, share)
        return DeviceModel(executor, profile.step, profile.scatter, link, block_bytes)

    return make
