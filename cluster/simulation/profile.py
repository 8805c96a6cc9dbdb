"""What an instance is and what its work costs: the numbers behind a simulated one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite

from cluster.simulation.scatter import Scatter
from instance.executor import ModelDescription
from instance.step_cost import StepCost

VALUE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, slots=True)
class CopyCost:
    """Copies between the device and host memory, one way.

    Attributes:
        bandwidth: Bytes per second.
        launch: Seconds that each contiguous copy costs on top.
    """

    bandwidth: float
    launch: float = 0.0

    def __post_init__(self) -> None:
        _check("bandwidth", self.bandwidth, above_zero=True)
        _check("launch", self.launch)

    def seconds(self, num_bytes: int, copies: int = 1) -> float:
        """Duration of ``copies`` contiguous copies of ``num_bytes`` in all."""
        return num_bytes / self.bandwidth + copies * self.launch


@dataclass(frozen=True, slots=True)
class LinkCost:
    """The way of KV to another instance.

    Attributes:
        bandwidth: Bytes per second.
        launch: Seconds that each contiguous copy costs on top.
        latency: Seconds that one message takes, one way.
    """

    bandwidth: float
    launch: float = 0.0
    latency: float = 0.0

    def __post_init__(self) -> None:
        _check("bandwidth", self.bandwidth, above_zero=True)
        _check("launch", self.launch)
        _check("latency", self.latency)

    def seconds(self, num_bytes: int, copies: int = 1) -> float:
        """From the first byte's departure to the arrival of the last."""
        return self.latency + num_bytes / self.bandwidth + copies * self.launch


@dataclass(frozen=True, slots=True)
class CostProfile:
    """One kind of instance.

    Attributes:
        name: By which people know it.
        model: What runs; its sizes say how large KV is.
        step: Durations of steps.
        copy_out: Copies of KV to host memory.
        copy_in: Copies of KV back.
        link: The way of KV to another instance.
        num_blocks: Usable KV blocks.
        num_host_blocks: Blocks of the host pool; 0 for none.
        overhead: Seconds that a request takes on an idle cluster until its first token is with
            the client, beside its steps: gateway, dispatcher, connections. 0: not measured.
        contention: Seconds that it takes longer while others wait for their first token, as
            where instances, gateways and clients share processors.
        scatter: How far durations of steps scatter around ``step``; None: not at all.
        sources: Where parameters come from, by name; "step.base" for one within another.

    Raises:
        ValueError: if a number makes no sense; the text names it.
    """

    name: str
    model: ModelDescription
    step: StepCost
    copy_out: CopyCost
    copy_in: CopyCost
    link: LinkCost
    num_blocks: int
    num_host_blocks: int = 0
    overhead: float = 0.0
    contention: float = 0.0
    scatter: Scatter | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model = self.model
        if model.dtype not in VALUE_BYTES:
            raise ValueError(f"model.dtype: {model.dtype!r} is not one of {', '.join(VALUE_BYTES)}")
        for name in (
            *("block_size", "num_layers", "num_kv_heads", "head_dim", "vocab_size"),
            "max_model_len",
        ):
            if getattr(model, name) < 1:
                raise ValueError(f"model.{name}: {getattr(model, name)} is less than 1")
        if self.num_blocks < 1:
            raise ValueError(f"num_blocks: {self.num_blocks} is less than 1")
        _check("overhead", self.overhead)
        _check("contention", self.contention)
        if self.num_host_blocks < 0:
            raise ValueError(f"num_host_blocks: {self.num_host_blocks} is less than 0")

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of KV of one token."""
        model = self.model
        values = 2 * model.num_layers * model.num_kv_heads * model.head_dim
        return values * VALUE_BYTES[model.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block."""
        return self.kv_token_bytes * self.model.block_size


def _check(name: str, value: float, above_zero: bool = False) -> None:
    if not isfinite(value) or value < 0 or (above_zero and value == 0):
        raise ValueError(f"{name}: {value} is not {'above 0' if above_zero else 'a cost'}")
