"""The books of the ledger: what an account has had, and what an instance has given."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from instance.request import Account

_PEAK_MEMORY = 30.0
"""Seconds over which a larger theta of the past is forgotten."""


class Gap(NamedTuple):
    """How far apart the waiting tenants of a class are.

    Attributes:
        gap: Greatest less least counter of the accounts that wait.
        bound: What the gap may not exceed (G).
        tenants: Number of accounts that wait.
    """

    gap: float
    bound: float
    tenants: int


@dataclass(slots=True)
class AccountBook:
    """One account.

    Attributes:
        counter: Service by weight, with lifts; never decreases.
        service: What was charged in this life of the ledger, and before as far as restored.
        lifted: Sum of its lifts, by weight.
        changed: Version of the ledger at which it changed last.
        waiting: Ids of its requests that wait anywhere in the cluster.
        idle_since: When it was charged or waited last.
    """

    counter: float = 0.0
    service: float = 0.0
    lifted: float = 0.0
    changed: int = 0
    waiting: set[str] = field(default_factory=set)
    idle_since: float = 0.0


@dataclass(slots=True)
class Given:
    """Service that one source gave.

    Attributes:
        applied: Sums that the counters contain; before the first report, those that the
            restored counters contained.
        reported: Its own sums.
        homes: What gateways got from it, by gateway.
        known: Version of the ledger that it last said to have.
        ready: The counters it works with are in the ledger, so it may be sent another.
        ended: When it was found gone; None while it lives.
        peak: The largest theta of late: a gap that it allowed is evened out in time only.
        seen: When ``peak`` was taken.
    """

    applied: dict[Account, float] = field(default_factory=dict)
    reported: dict[Account, float] = field(default_factory=dict)
    homes: dict[str, dict[Account, float]] = field(default_factory=dict)
    system: int = 0
    theta: float = 0.0
    increment: float = 0.0
    known: int = 0
    ready: bool = False
    ended: float | None = None
    peak: float = 0.0
    seen: float = 0.0

    def see(self, theta: float, increment: float, now: float) -> None:
        """Take over what the newest report says."""
        self.theta, self.increment = theta, increment
        past = self.peak * math.exp((self.seen - now) / _PEAK_MEMORY)
        self.peak, self.seen = max(theta, past), now
