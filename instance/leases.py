"""An instance's share of the cluster's ledger of service.

The dispatcher keeps the counters of all tenants. An instance works with the last ledger it
was sent plus what it has charged since, and may charge a *lease* per tenant before it must
report. What it reports is cumulative since its start, so that a report that is lost, doubled
or overtaken does no harm, and a ledger names how much of that it contains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from instance.fairness import service
from instance.request import Account, RequestClass


class AccountState(NamedTuple):
    """One account of a ledger.

    Attributes:
        counter: Service by weight, lifts included.
        waiting: Requests of it wait somewhere in the cluster.
        weight: The tenant's.
        applied: Service charged by the receiving instance that the counter contains.
    """

    account: Account
    counter: float
    waiting: bool
    weight: float
    applied: float = 0.0


@dataclass(frozen=True, slots=True)
class LedgerUpdate:
    """A ledger, or what has changed in it, for one instance.

    Attributes:
        version: Of the ledger; grows, also over restarts of the dispatcher.
        since: The version that the update builds on; 0 where it holds every account.
        lease: Service by weight that the instance may charge per account unreported.
        last_waited: By class, the account that waited last.
    """

    version: int
    since: int
    lease: float
    accounts: tuple[AccountState, ...]
    last_waited: tuple[Account, ...] = ()


@dataclass(frozen=True, slots=True)
class ServiceReport:
    """What an instance reports of the service it gives.

    Attributes:
        charged: Service charged to each account since the start of the instance.
        system: Positions computed again since then, which no tenant pays for.
        ledger: Version of the ledger that it works with; 0 where it has none.
        theta: How far ahead a tenant must be for its sequences to be preempted.
        increment: Service that it may charge at most between two looks at the counters.
        leased: The report was made because a lease is used up.
    """

    charged: tuple[tuple[Account, float], ...] = ()
    system: int = 0
    ledger: int = 0
    theta: float = 0.0
    increment: float = 0.0
    leased: bool = False


@dataclass(slots=True)
class _Entry:
    """What the instance knows of an account.

    ``counter``, ``known_waiting`` and ``applied`` are the ledger's; ``lifted`` is the lift
    that the ledger will give as soon as it knows what waits here.
    """

    counter: float = 0.0
    applied: float = 0.0
    known_waiting: bool = False
    charged: float = 0.0
    reported: float = 0.0
    lifted: float = 0.0
    waiting: set[str] = field(default_factory=set)


class LeasedCounters:
    """Counters of an instance in a cluster; an ``instance.fairness.ServiceCounters``.

    Without a ledger, and while the dispatcher is away, it goes on with what it charges
    itself, and lifts by what waits here.

    Args:
        weights: By tenant; the ledger's take their place.
        default_weight: Of other tenants.

    Attributes:
        version: Of the ledger taken last; 0 before the first.
        lease: Service by weight that may be charged per account unreported.
        system: Positions computed again.
    """

    def __init__(
        self, weights: Mapping[str, float] | None = None, default_weight: float = 1.0
    ) -> None:
        self.version = 0
        self.lease = math.inf
        self.system = 0
        self._weights = dict(weights or {})
        self._default_weight = default_weight
        self._entries: dict[Account, _Entry] = {}
        self._last_waited: dict[RequestClass, Account] = {}
        self._due = False

    # ---- what the scheduler asks and says

    def counter(self, account: Account) -> float:
        """The ledger's counter, and what was charged here that it does not contain."""
        entry = self._entries.get(account)
        return 0.0 if entry is None else self._value(account, entry)

    def weight(self, tenant: str) -> float:
        """The tenant's share relative to others, above 0."""
        return self._weights.get(tenant, self._default_weight)

    def charge(self, account: Account, prompt: int, output: int) -> None:
        """Work was done for a tenant."""
        entry = self._entry(account)
        entry.charged += service(prompt, output)
        if (entry.charged - entry.reported) >= self.lease * self.weight(account[0]):
            self._due = True

    def charge_system(self, tokens: int) -> None:
        """Positions were computed again."""
        self.system += tokens

    def waiting_begins(self, account: Account, request_id: str) -> None:
        """The request waits here. Where the ledger does not know that the tenant waits, it is
        lifted here as the ledger will lift it."""
        entry = self._entry(account)
        if not entry.waiting and not entry.known_waiting:
            level = self._level(account)
            if level is not None:
                entry.lifted += max(0.0, level - self._value(account, entry))
        entry.waiting.add(request_id)

    def waiting_ends(self, account: Account, request_id: str, moved: bool = False) -> None:
        """It no longer waits here."""
        entry = self._entry(account)
        if request_id in entry.waiting:
            entry.waiting.remove(request_id)
            if not moved:
                self._last_waited[account[1]] = account

    def charged(self, account: Account) -> float:
        """Service charged here since the start."""
        entry = self._entries.get(account)
        return 0.0 if entry is None else entry.charged

    # ---- the ledger's side

    @property
    def due(self) -> bool:
        """A lease is used up: the dispatcher should hear of it at once."""
        return self._due

    def left(self, account: Account) -> float:
        """Service that may be charged to an account before a report becomes due; none where
        one is due already."""
        if self._due:
            return 0.0
        entry = self._entries.get(account)
        used = 0.0 if entry is None else entry.charged - entry.reported
        return self.lease * self.weight(account[0]) - used

    def report(self, theta: float = 0.0, increment: float = 0.0) -> ServiceReport:
        """Everything charged so far; the leases begin anew with it.

        Another report is due a lease later, whether or not this one arrives: while the
        dispatcher is away nothing waits for it.
        """
        leased, self._due = self._due, False
        for entry in self._entries.values():
            entry.reported = entry.charged
        return ServiceReport(
            charged=tuple(
                (account, entry.charged)
                for account, entry in self._entries.items()
                if entry.charged
            ),
            system=self.system,
            ledger=self.version,
            theta=theta,
            increment=increment,
            leased=leased,
        )

    def take(self, update: LedgerUpdate) -> bool:
        """Take over a newer ledger; false, and no change, if it is older or does not fit.

        A change that builds on a ledger never received does not fit; the version in the next
        report tells the dispatcher what to send.
        """
        if update.version <= self.version or update.since > self.version:
            return False
        self.version = update.version
        self.lease = update.lease
        for state in update.accounts:
            entry = self._entry(state.account)
            self._weights[state.account[0]] = state.weight
            entry.counter = state.counter
            entry.applied = state.applied
            entry.known_waiting = state.waiting
            if state.waiting or not entry.waiting:
                entry.lifted = 0.0
        for account in update.last_waited:
            self._last_waited[account[1]] = account
        return True

    def changes_leases(self, update: LedgerUpdate) -> bool:
        """Whether with this ledger other sums may be charged unreported than now."""
        return update.lease != self.lease or any(
            state.weight != self.weight(state.account[0]) for state in update.accounts
        )

    def copy(self) -> LedgerUpdate:
        """The ledger as it was received last, to rebuild the dispatcher's from."""
        return LedgerUpdate(
            version=self.version,
            since=0,
            lease=self.lease,
            accounts=tuple(
                AccountState(
                    account,
                    entry.counter,
                    entry.known_waiting,
                    self.weight(account[0]),
                    entry.applied,
                )
                for account, entry in self._entries.items()
                if entry.counter or entry.applied
            ),
            last_waited=tuple(self._last_waited.values()),
        )

    # ----

    def _value(self, account: Account, entry: _Entry) -> float:
        own = max(0.0, entry.charged - entry.applied)
        return entry.counter + own / self.weight(account[0]) + entry.lifted

    def _level(self, account: Account) -> float | None:
        """To what a tenant that begins to wait is lifted; None for not at all."""
        waiting = [
            self._value(other, entry)
            for other, entry in self._others(account)
            if entry.waiting or entry.known_waiting
        ]
        if waiting:
            return min(waiting)
        last = self._last_waited.get(account[1])
        return None if last is None else self.counter(last)

    def _others(self, account: Account) -> Iterable[tuple[Account, _Entry]]:
        return (
            (other, entry)
            for other, entry in self._entries.items()
            if other[1] == account[1] and other != account
        )

    def _entry(self, account: Account) -> _Entry:
        entry = self._entries.get(account)
        if entry is None:
            entry = self._entries[account] = _Entry()
        return entry
