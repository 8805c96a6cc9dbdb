"""What tenants may have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from instance.request import RequestClass


@dataclass(frozen=True, slots=True)
class TenantPolicy:
    """What a tenant may have.

    Attributes:
        weight: Share of service relative to other tenants, above 0.
        max_queued: Requests that wait in the dispatcher at most; None: the cluster's limit.
        classes: Priority classes that the tenant may use.

    Raises:
        ValueError: A value is out of range.
    """

    weight: float = 1.0
    max_queued: int | None = None
    classes: tuple[RequestClass, ...] = tuple(RequestClass)

    def __post_init__(self) -> None:
        if not 0.0 < self.weight < math.inf:
            raise ValueError(f"weight {self.weight} is not a finite number above 0")
        if self.max_queued is not None and self.max_queued < 0:
            raise ValueError(f"max_queued {self.max_queued} is less than 0")
        if not self.classes:
            raise ValueError("a tenant needs at least one class")


def policy_to_json(policy: TenantPolicy) -> dict[str, Any]:
    """A policy as the tenants file and the admin API write it."""
    return {
        "weight": policy.weight,
        "max_queued": policy.max_queued,
        "classes": [one.name.lower() for one in policy.classes],
    }


def policy_from_json(fields: Mapping[str, Any], base: TenantPolicy) -> TenantPolicy:
    """``base`` with the fields given.

    Raises:
        ValueError: A field is unknown, or its value is; the text says which.
    """
    unknown = set(fields) - {"weight", "max_queued", "classes"}
    if unknown:
        raise ValueError(f"unknown field {min(unknown)!r}; known: weight, max_queued, classes")
    policy = base
    if "weight" in fields:
        weight = fields["weight"]
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ValueError(f"weight {weight!r} is not a number")
        policy = replace(policy, weight=float(weight))
    if "max_queued" in fields:
        most = fields["max_queued"]
        if most is not None and (isinstance(most, bool) or not isinstance(most, int)):
            raise ValueError(f"max_queued {most!r} is not a whole number")
        policy = replace(policy, max_queued=most)
    if "classes" in fields:
        names = fields["classes"]
        known = {one.name.lower(): one for one in RequestClass}
        if not isinstance(names, list) or not all(name in known for name in names):
            raise ValueError(f"classes {names!r} is not a list of {', '.join(known)}")
        policy = replace(policy, classes=tuple(sorted({known[name] for name in names})))
    return policy
