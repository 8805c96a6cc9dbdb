"""What gateways and instances say to the dispatcher, and what it answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from instance.load import InstanceInfo
from instance.request import Account, RequestClass


@dataclass(frozen=True, slots=True)
class PlaceRequest:
    """Where should this request run? Metadata only; idempotent by (request_id, epoch).

    Attributes:
        epoch: The epoch under which the gateway will submit; 1 for a new request, more
            for a replay.
        num_tokens: Prompt tokens, and for a replay the emitted ones too.
        max_tokens: Output tokens at most.
        avoid: Instances that the gateway saw failing for this request.
        prefix: Keys of the prompt's leading blocks, one after the other
            (``instance.kv.prefix_events.prompt_keys``).
        time_left: Seconds until nobody wants the answer any more.
    """

    request_id: str
    epoch: int
    gateway_id: str
    tenant: str
    request_class: RequestClass
    num_tokens: int
    max_tokens: int
    arrival: float
    model: str = ""
    avoid: tuple[str, ...] = ()
    prefix: bytes = b""
    time_left: float = math.inf

    @property
    def account(self) -> Account:
        """Who is charged."""
        return self.tenant, self.request_class


@dataclass(frozen=True, slots=True)
class Placement:
    """The request goes to this instance."""

    request_id: str
    epoch: int
    instance_id: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """The request cannot run now.

    Attributes:
        status: HTTP status that fits: 403, 404, 408, 429 or 503.
        reason: For people.
        retry_after: Seconds.
        code: For programs; "" where the status says it all.
    """

    request_id: str
    epoch: int
    status: int
    reason: str
    retry_after: float = 1.0
    code: str = ""


@dataclass(frozen=True, slots=True)
class InstanceView:
    """One instance as the dispatcher sees it.

    Attributes:
        state: "ready", "suspect" or "draining".
        freeness: Free KV blocks after demand, per running request (Llumnix, section 4.4).
        load: Used or promised KV blocks over total.
    """

    info: InstanceInfo
    state: str
    freeness: float
    load: float
    free_blocks: int
    running: int
    waiting: int
    step_seconds: float


@dataclass(frozen=True, slots=True)
class ClusterView:
    """Membership and load at one version; gateways place by it while the dispatcher is away.

    Attributes:
        overrides: Operators' settings as ``Overrides.export`` gives them; a gateway returns
            them, and the ledger, to a dispatcher that was restarted.
        ledger: What tenants have received, as ``FairnessLedger.export_state`` gives it.
    """

    version: int
    instances: tuple[InstanceView, ...] = field(default_factory=tuple)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    ledger: Mapping[str, Any] = field(default_factory=dict)
