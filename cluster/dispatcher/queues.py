"""Requests that wait in the dispatcher for an instance with room, by tenant and class."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cluster.dispatcher.messages import PlaceRequest
from instance.request import Account, RequestClass

FIRST_RETRY, LAST_RETRY = 1.0, 60.0
"""Seconds: the least and the most that a refused client is told to wait."""
_MEMORY = 20.0
"""Seconds over which a rate of service is averaged."""


@dataclass(slots=True, eq=False)
class Held:
    """A request that waits here.

    Attributes:
        since: When it came.
        heard: When its gateway asked last; one that is gone asks no more.
        deadline: When nobody will want its answer any more.
    """

    request: PlaceRequest
    since: float
    heard: float
    deadline: float = math.inf

    @property
    def account(self) -> Account:
        return self.request.account


class Rate:
    """Events per second of the recent past, forgetting exponentially."""

    __slots__ = ("_at", "_value")

    def __init__(self) -> None:
        self._value = 0.0
        self._at = -math.inf

    def note(self, now: float) -> None:
        """Something happened."""
        self._value = self.at(now) + 1.0 / _MEMORY
        self._at = now

    def at(self, now: float) -> float:
        """Events per second."""
        return self._value * math.exp((self._at - now) / _MEMORY)


def _age(held: Held) -> tuple[float, str]:
    return held.request.arrival, held.request.request_id


class RequestQueues:
    """One queue per account and model, each in order of arrival.

    Whoever takes from one does so from the front; see ``binding`` for who may pass.
    """

    def __init__(self) -> None:
        self._held: dict[str, Held] = {}
        self._queues: dict[tuple[Account, str], list[Held]] = {}
        self._tenants: dict[str, int] = {}
        self._classes: dict[RequestClass, int] = dict.fromkeys(RequestClass, 0)
        self._served = Rate()
        self._rates: dict[str, Rate] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Held]:
        return iter(list(self._held.values()))

    def get(self, request_id: str) -> Held | None:
        """The request that waits here under this id."""
        return self._held.get(request_id)

    def of_tenant(self, tenant: str) -> int:
        """Requests of a tenant that wait."""
        return self._tenants.get(tenant, 0)

    def up_to_class(self, request_class: RequestClass) -> int:
        """Requests of a class and of all higher ones that wait."""
        return sum(count for one, count in self._classes.items() if one <= request_class)

    def add(self, held: Held) -> None:
        """Queue a request; its id must not be here."""
        request = held.request
        self._held[request.request_id] = held
        queue = self._queues.setdefault((request.account, request.model), [])
        insort(queue, held, key=_age)
        self._tenants[request.tenant] = self.of_tenant(request.tenant) + 1
        self._classes[request.request_class] += 1

    def remove(self, held: Held) -> None:
        """A request leaves, whatever for."""
        request = held.request
        del self._held[request.request_id]
        key = request.account, request.model
        self._queues[key].remove(held)
        if not self._queues[key]:
            del self._queues[key]
        self._classes[request.request_class] -= 1
        self._tenants[request.tenant] -= 1
        if not self._tenants[request.tenant]:
            del self._tenants[request.tenant]

    def in_order(self, counter: Callable[[Account], float]) -> list[list[Held]]:
        """The queues, those to be served first in front: by class, counter and arrival."""

        def rank(queue: list[Held]) -> tuple[int, float, tuple[float, str]]:
            account = queue[0].account
            return account[1], counter(account), _age(queue[0])

        return sorted(self._queues.values(), key=rank)

    def queue_of(self, held: Held) -> list[Held]:
        """The queue that a request is in."""
        return self._queues[held.account, held.request.model]

    # ---- how long it takes

    def served(self, tenant: str, now: float) -> None:
        """A request of a tenant got its instance, having waited here or not."""
        self._served.note(now)
        self._rates.setdefault(tenant, Rate()).note(now)

    def wait(self, now: float) -> float:
        """Seconds until those that wait are served, at the recent rate."""
        return _seconds(len(self._held), self._served, now)

    def tenant_wait(self, tenant: str, now: float) -> float:
        """The same, as the tenant's own requests were served."""
        return _seconds(self.of_tenant(tenant), self._rates.get(tenant), now)

    def forget_rates(self, now: float) -> None:
        """Drop the rates of tenants that had nothing served for long."""
        for tenant, rate in list(self._rates.items()):
            if rate.at(now) < 1e-6:
                del self._rates[tenant]


def _seconds(requests: int, rate: Rate | None, now: float) -> float:
    per_second = 0.0 if rate is None else rate.at(now)
    if per_second * LAST_RETRY <= requests:
        return LAST_RETRY
    return max(FIRST_RETRY, requests / per_second)
