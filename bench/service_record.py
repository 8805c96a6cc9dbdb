"""Who had received how much service when, and how unequal that was."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field

from instance.clock import Clock
from instance.fairness import TenantCounters, service
from instance.leases import LeasedCounters
from instance.request import Account, RequestClass

WINDOW = 60.0
"""Seconds of a window of the windowed service difference."""


@dataclass(slots=True)
class ServiceRecord:
    """Demand and service of tenants over time, each divided by the tenant's weight.

    Attributes:
        weights: By tenant; 1 where there is none.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    _demand: dict[str, _Sum] = field(default_factory=dict)
    _service: dict[str, _Sum] = field(default_factory=dict)

    def asked(self, tenant: str, prompt: int, output: int, now: float) -> None:
        """A request arrived; calls come in the order of time."""
        self._add(self._demand, tenant, service(prompt, output), now)

    def served(self, tenant: str, prompt: int, output: int, now: float) -> None:
        """Work was done; calls come in the order of time."""
        self.served_units(tenant, service(prompt, output), now)

    def served_units(self, tenant: str, units: float, now: float) -> None:
        """So much service was given; calls come in the order of time."""
        self._add(self._service, tenant, units, now)

    def _add(self, sums: dict[str, _Sum], tenant: str, amount: float, now: float) -> None:
        sums.setdefault(tenant, _Sum()).add(amount / self.weights.get(tenant, 1.0), now)

    def received(self, start: float, end: float) -> dict[str, float]:
        """Service of every tenant that ever asked, in (start, end]."""
        return {tenant: self._between(self._service, tenant, start, end) for tenant in self._demand}

    def asked_until(self, end: float) -> dict[str, float]:
        """What every tenant has asked for by then."""
        return {tenant: sums.until(end) for tenant, sums in self._demand.items()}

    def differences(self, end: float, window: float = WINDOW, stride: float = 1.0) -> list[float]:
        """The windowed service difference of VTC (OSDI '24), per second, of all windows.

        In a window a tenant could have received what the best served one did, or what it
        asked for. The difference is the lesser of both gaps, summed over the tenants.

        Args:
            end: Of the last window, in seconds; the first starts at 0.
            window: Seconds.
            stride: Seconds between two windows.
        """
        found = []
        for number in range(max(0, int((end - window) / stride)) + 1):
            start = number * stride
            got = self.received(start, start + window)
            most = max(got.values(), default=0.0)
            total = sum(
                min(most - one, abs(self._between(self._demand, name, start, start + window) - one))
                for name, one in got.items()
            )
            found.append(total / window)
        return found

    def level(self, tenant: str) -> float:
        """Service of a tenant so far."""
        found = self._service.get(tenant)
        return found.totals[-1] if found is not None else 0.0

    @staticmethod
    def _between(sums: dict[str, _Sum], tenant: str, start: float, end: float) -> float:
        found = sums.get(tenant)
        return 0.0 if found is None else found.until(end) - found.until(start)


@dataclass(slots=True)
class _Sum:
    """A sum that grows over time."""

    times: list[float] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)

    def add(self, amount: float, now: float) -> None:
        total = amount + (self.totals[-1] if self.totals else 0.0)
        if self.times and self.times[-1] == now:
            self.totals[-1] = total
        else:
            self.times.append(now)
            self.totals.append(total)

    def until(self, now: float) -> float:
        index = bisect_right(self.times, now)
        return self.totals[index - 1] if index else 0.0


class Spread:
    """The accumulated service difference of VTC (OSDI '24): how much more service, by weight,
    one of two tenants received than the other over a time in which both waited.

    Attributes:
        most: Of all such times and tenants.
    """

    def __init__(self) -> None:
        self.most = 0.0
        self._extremes: dict[tuple[str, str], tuple[float, float]] = {}

    def look(self, waiting: Mapping[str, float]) -> None:
        """These tenants wait now, and have received so much in all; called after each step."""
        old, self._extremes = self._extremes, {}
        for pair in itertools.combinations(sorted(waiting), 2):
            ahead = waiting[pair[0]] - waiting[pair[1]]
            low, high = old.get(pair, (ahead, ahead))
            self._extremes[pair] = low, high = min(low, ahead), max(high, ahead)
            self.most = max(self.most, high - low)


class WatchedCounters(LeasedCounters):
    """The counters of an instance that stands alone, for whoever wants those of one in a
    cluster; keeps a record.

    Args:
        weights: By tenant; 1 where there is none.
        clock: Tells when something is charged.
        blind: Tell the scheduler that all are alike, so that it serves in the order of
            arrival.

    Attributes:
        record: Of all that was charged.
        gap: How far apart the counters of two tenants that waited were at most.
        spread: How much more service one of them received than the other.
    """

    def __init__(self, weights: Mapping[str, float], clock: Clock, blind: bool = False) -> None:
        super().__init__(weights)
        self.record = ServiceRecord(weights)
        self.gap = 0.0
        self.spread = Spread()
        self._clock = clock
        self._blind = blind
        self._true = TenantCounters(weights)

    def counter(self, account: Account) -> float:
        return 0.0 if self._blind else self._true.counter(account)

    def weight(self, tenant: str) -> float:
        # So heavy that no service counts.
        return math.inf if self._blind else self._true.weight(tenant)

    def charge(self, account: Account, prompt: int, output: int) -> None:
        self._true.charge(account, prompt, output)
        self.record.served(account[0], prompt, output, self._clock.now())

    def waiting_begins(self, account: Account, request_id: str) -> None:
        self._true.waiting_begins(account, request_id)

    def waiting_ends(self, account: Account, request_id: str, moved: bool = False) -> None:
        self._true.waiting_ends(account, request_id, moved)

    def look(self) -> None:
        """Note how far apart the tenants that wait are now."""
        waiting = self._true.waiting(RequestClass.STANDARD)
        counters = waiting.values()
        if len(counters) > 1:
            self.gap = max(self.gap, max(counters) - min(counters))
        self.spread.look({tenant: self.record.level(tenant) for tenant in waiting})
