"""Tenants' service: what a sequence's work is worth, and who has received how much of it.

A *counter* is a tenant's service divided by its weight, per priority class, and only ever
grows (Virtual Token Counter, Sheng et al., OSDI '24). The scheduler serves the smallest one
first. It knows counters through :class:`ServiceCounters` alone: :class:`TenantCounters`
keeps them for an instance by itself; in a cluster a ledger shared by all instances takes
its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from instance.request import Account, RequestClass, Sequence

PROMPT_WEIGHT = 1.0
"""Service of a prompt token that is computed (w_p of VTC)."""
OUTPUT_WEIGHT = 2.0
"""Service of an output token (w_q of VTC)."""


def service(prompt: int, output: int) -> float:
    """Service of so many prompt tokens computed and output tokens drawn."""
    return PROMPT_WEIGHT * prompt + OUTPUT_WEIGHT * output


class ServiceCounters(Protocol):
    """What the scheduler asks of whoever keeps the tenants' service.

    It reads counters every few steps and orders its queues by them then, so an
    implementation may take over newer figures from elsewhere at any time between two calls.

    A request *waits* while it is queued, swapped out or paused in its prefill. The two
    ``waiting`` calls are idempotent per request id.
    """

    def counter(self, account: Account) -> float:
        """Service received, divided by the tenant's weight; the lift is in it."""

    def weight(self, tenant: str) -> float:
        """The tenant's share relative to others, above 0."""

    def charge(self, account: Account, prompt: int, output: int) -> None:
        """Work was done for the tenant: each token of a request is charged once, whoever
        computes it how often."""

    def charge_system(self, tokens: int) -> None:
        """Positions were computed again after a preemption; no tenant pays for that."""

    def waiting_begins(self, account: Account, request_id: str) -> None:
        """The request waits here from now on, if it did not yet."""

    def waiting_ends(self, account: Account, request_id: str, moved: bool = False) -> None:
        """It no longer waits here. ``moved``: it has left for another instance, so whether
        it waits is no longer for this one to say."""


def charge_work(counters: ServiceCounters, sequence: Sequence, start: int, end: int) -> None:
    """Charge what a step did for a sequence; its tokens are known already.

    The tenant pays for each prompt token beyond those cached at first admission, and for
    each output token, once: what is charged in all does not depend on how often the
    sequence lost its KV, or where it ran. The rest is the system's.

    Args:
        sequence: Its marks ``charged_prompt`` and ``charged_output`` move up. While it is
            silent nothing is charged; the next charge makes up for that.
        start: First position computed.
        end: The one after the last.
    """
    if sequence.silent:
        return
    paid = max(sequence.charged_prompt, sequence.num_cached)
    if sequence.charged_output:
        # The last output token charged was drawn, but its position is yet to be computed.
        done = sequence.num_prompt + sequence.charged_output - 1
    else:
        done = paid
    if start < done:
        counters.charge_system(min(end, done) - start)
    prompt = max(0, min(end, sequence.num_prompt) - paid)
    output = max(0, sequence.num_output - sequence.charged_output)
    if prompt or output:
        counters.charge(sequence.account, prompt, output)
    sequence.charged_prompt = paid + prompt
    sequence.charged_output += output


@dataclass(slots=True)
class _Entry:
    """A tenant's standing within a class."""

    counter: float = 0.0
    waiting: set[str] = field(default_factory=set)


class TenantCounters:
    """The counters of an instance that stands alone; a ``ServiceCounters``.

    A tenant that begins to wait is lifted to the least counter of the other waiting tenants
    of its class, or, where none waits, to that of the one that waited last: time in which it
    asked for nothing gives no credit. What it still runs at that moment does not matter.

    Args:
        weights: By tenant.
        default_weight: Of tenants not named there.

    Attributes:
        system: Positions computed again, in tokens.
        lifted: Sum of all lifts, so that counters can be accounted for.
    """

    def __init__(
        self, weights: Mapping[str, float] | None = None, default_weight: float = 1.0
    ) -> None:
        self.system = 0
        self.lifted = 0.0
        self._weights: dict[str, float] = {}
        self._default = _checked("", default_weight)
        self._classes: dict[RequestClass, dict[str, _Entry]] = {}
        self._last_waited: dict[RequestClass, str] = {}
        for tenant, weight in (weights or {}).items():
            self.set_weight(tenant, weight)

    def set_weight(self, tenant: str, weight: float) -> None:
        """Change a tenant's weight; what it received before keeps its worth.

        Raises:
            ValueError: The weight is not a finite number above 0.
        """
        self._weights[tenant] = _checked(tenant, weight)

    def weight(self, tenant: str) -> float:
        return self._weights.get(tenant, self._default)

    def counter(self, account: Account) -> float:
        tenant, request_class = account
        entry = self._classes.get(request_class, {}).get(tenant)
        return 0.0 if entry is None else entry.counter

    def charge(self, account: Account, prompt: int, output: int) -> None:
        self._entry(account).counter += service(prompt, output) / self.weight(account[0])

    def charge_system(self, tokens: int) -> None:
        self.system += tokens

    def waiting_begins(self, account: Account, request_id: str) -> None:
        entry = self._entry(account)
        if not entry.waiting:
            self._lift(account, entry)
        entry.waiting.add(request_id)

    def waiting_ends(self, account: Account, request_id: str, moved: bool = False) -> None:
        entry = self._entry(account)
        if request_id in entry.waiting:
            entry.waiting.remove(request_id)
            self._last_waited[account[1]] = account[0]

    def waiting(self, request_class: RequestClass) -> dict[str, float]:
        """Counters of the tenants that wait in a class."""
        entries = self._classes.get(request_class, {})
        return {tenant: entry.counter for tenant, entry in entries.items() if entry.waiting}

    def _entry(self, account: Account) -> _Entry:
        tenant, request_class = account
        entries = self._classes.setdefault(request_class, {})
        entry = entries.get(tenant)
        if entry is None:
            entry = entries[tenant] = _Entry()
        return entry

    def _lift(self, account: Account, entry: _Entry) -> None:
        request_class = account[1]
        others = self.waiting(request_class)
        if others:
            level = min(others.values())
        elif request_class in self._last_waited:
            level = self.counter((self._last_waited[request_class], request_class))
        else:
            return
        if level > entry.counter:
            self.lifted += level - entry.counter
            entry.counter = level


def _checked(tenant: str, weight: float) -> float:
    if not 0.0 < weight < float("inf"):
        raise ValueError(f"weight {weight} of tenant {tenant!r} is not a finite number above 0")
    return weight
