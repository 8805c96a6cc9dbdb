"""What a simulated instance runs on, made from a cost profile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.simulation.network import KvLink
from cluster.simulation.profile import CostProfile
from instance.clock import Clock
from instance.model.modelled import ModelledExecutor
from instance.step_cost import StepCost


@dataclass(frozen=True, slots=True)
class DeviceModel:
    """A device in one life of an instance.

    Attributes:
        executor: Model, KV pool and, where there is a host pool, its copier.
        cost: Durations of steps.
        link: The way out for KV.
        block_bytes: Bytes of a KV block.
    """

    executor: ModelledExecutor
    cost: StepCost
    link: KvLink
    block_bytes: int


DeviceMaker = Callable[[Clock], DeviceModel]


def device(profile: CostProfile, share: float) -> DeviceMaker:
    """Makes the device of a profile.

    Args:
        share: Bytes per second that migrations may send beside decoding; 0 is unlimited.
    """

    def make(clock: Clock) -> DeviceModel:
        executor = ModelledExecutor(profile.model, profile.num_blocks + 1, clock, profile.step)
        link = KvLink(profile.link, share)
        return DeviceModel(executor, profile.step, link, profile.block_bytes)

    return make
