"""The cluster's ledger: which tenant has received how much service.

One counter per account (a tenant within a priority class): service divided by the tenant's
weight, plus lifts (Virtual Token Counter, Sheng et al., OSDI '24, which knows one server).
Instances charge as they work and report cumulative sums, so each message may be lost,
doubled or overtaken. What an instance charged and never reported is known, up to what was on
its way, by the gateways that got its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cluster.dispatcher.accounts import AccountBook, Gap, Given
from cluster.dispatcher.tenants import TenantPolicy
from instance.leases import AccountState, LedgerUpdate, ServiceReport
from instance.request import Account, RequestClass


class Source(NamedTuple):
    """Who gives service: one incarnation of an instance."""

    instance_id: str
    incarnation: str


LEAST_LEASE = 1 / 16
"""Of the increment, which an instance may always charge unreported: a small theta, or many
instances, must not have every step reported. The bound has two increments per instance, so this
adds 3 % to it at most, for tenants of weight 1."""


class FairnessLedger:
    """Counters of all tenants, their waiting sets, and what each instance has reported.

    Args:
        version: First version; must exceed those of earlier lives.
        tenants: Policies by tenant.
        default: Policy of tenants not named there.

    Attributes:
        version: Grows with every change.
        accounts: Books by account.
        tenants: Policies by tenant; change them by ``set_tenant``.
        system: Positions computed again, which no tenant pays for.
        lease_reports: Reports that came because a lease was used up.
    """

    def __init__(
        self,
        version: int = 1,
        tenants: Mapping[str, TenantPolicy] | None = None,
        default: TenantPolicy | None = None,
    ) -> None:
        self.version = version
        self.accounts: dict[Account, AccountBook] = {}
        self.tenants = dict(tenants or {})
        self.default = default or TenantPolicy()
        self.system = 0
        self.lease_reports = 0
        self._first = version
        self._base = 0
        self._given: dict[Source, Given] = {}
        # None where what instances say of themselves, or who lives, has changed since.
        self._lease: float | None = None
        self._last_waited: dict[RequestClass, Account] = {}

    # ---- tenants

    def policy(self, tenant: str) -> TenantPolicy:
        """What a tenant may have."""
        return self.tenants.get(tenant, self.default)

    def set_tenant(self, tenant: str, policy: TenantPolicy) -> None:
        """Change a tenant's policy; service received before keeps its worth."""
        self.tenants[tenant] = policy
        for account, book in self.accounts.items():
            if account[0] == tenant:
                self._touch(book)

    def counter(self, account: Account) -> float:
        """Service by weight; 0 for an account never heard of."""
        book = self.accounts.get(account)
        return 0.0 if book is None else book.counter

    # ---- waiting

    def begin_waiting(self, account: Account, request_id: str, now: float) -> None:
        """A request waits; the first one of an account lifts it.

        The lift is to the least counter of the other accounts of the class that wait, or,
        where none waits, to that of the one that waited last. What the tenant still runs does
        not matter: lifting only a tenant that runs nothing breaks the bound.
        """
        book = self._book(account, now)
        if request_id in book.waiting:
            return
        if not book.waiting:
            self._lift(account, book)
            self._touch(book)
        book.waiting.add(request_id)
        book.idle_since = now

    def end_waiting(self, account: Account, request_id: str, now: float) -> None:
        """A request runs, or has ended."""
        book = self.accounts.get(account)
        if book is None or request_id not in book.waiting:
            return
        book.waiting.remove(request_id)
        book.idle_since = now
        if not book.waiting:
            self._last_waited[account[1]] = account
            self._touch(book)

    def waiting(self, request_class: RequestClass) -> list[Account]:
        """The accounts of a class that wait."""
        return [
            account
            for account, book in self.accounts.items()
            if account[1] == request_class and book.waiting
        ]

    def _lift(self, account: Account, book: AccountBook) -> None:
        level = self._level(account)
        if level > book.counter:
            book.lifted += level - book.counter
            book.counter = level

    def _level(self, account: Account) -> float:
        request_class = account[1]
        others = [self.counter(one) for one in self.waiting(request_class) if one != account]
        if others:
            return min(others)
        last = self._last_waited.get(request_class)
        return -math.inf if last is None else self.counter(last)

    # ---- service

    def report(self, source: Source, report: ServiceReport, now: float) -> bool:
        """Take what an instance reports, in any order and any number of times.

        Returns:
            Whether the source's copy of the ledger is wanted: it works with one that this
            ledger does not come from, so that its service cannot be told apart yet.
        """
        given = self._given.setdefault(source, Given())
        self.lease_reports += report.leased
        # The sums only grow, so of several reports the greatest is the newest.
        for account, charged in report.charged:
            given.reported[account] = max(charged, given.reported.get(account, 0.0))
        self.system += max(0, report.system - given.system)
        given.system = max(given.system, report.system)
        given.known = max(given.known, report.ledger)
        if (given.theta, given.increment) != (report.theta, report.increment):
            self._lease = None
        given.see(report.theta, report.increment, now)
        if not given.ready and not 0 < report.ledger < self._first:
            given.ready = True
        if not given.ready:
            return True
        self._apply(given, now)
        return False

    def homes_report(
        self, gateway: str, source: Source, charged: Iterable[tuple[Account, float]], now: float
    ) -> None:
        """A gateway lost its stream to ``source``; ``charged`` is the service it got from it.

        The sum over gateways stands for what the source charged if that is more than it has
        reported: nothing, where it still lives and reports.
        """
        given = self._given.get(source)
        if given is None or not given.ready:
            return  # what of it the counters contain cannot be told any more
        sums = given.homes.setdefault(gateway, {})
        for account, service in charged:
            sums[account] = max(service, sums.get(account, 0.0))
        self._apply(given, now)

    def _apply(self, given: Given, now: float) -> None:
        totals = dict(given.reported)
        seen: dict[Account, float] = {}
        for sums in given.homes.values():
            for account, service in sums.items():
                seen[account] = seen.get(account, 0.0) + service
        for account, service in seen.items():
            totals[account] = max(service, totals.get(account, 0.0))
        for account, total in totals.items():
            new = total - given.applied.get(account, 0.0)
            if new > 0.0:
                given.applied[account] = total
                book = self._book(account, now)
                book.service += new
                book.counter += new / self.policy(account[0]).weight
                book.idle_since = now
                self._touch(book)

    def ended(self, source: Source, now: float) -> None:
        """An incarnation is gone: it gives no more service, but late reports still count."""
        given = self._given.get(source)
        if given is not None and given.ended is None:
            given.ended = now
            self._lease = None

    def resumed(self, source: Source) -> None:
        """An incarnation that was taken for gone is heard of again."""
        given = self._given.get(source)
        if given is not None and given.ended is not None:
            given.ended = None
            self._lease = None

    def expire(self, now: float, lifetime: float) -> None:
        """Forget sources and accounts that ended or did nothing ``lifetime`` seconds ago."""
        for source, given in list(self._given.items()):
            if given.ended is not None and now - given.ended > lifetime:
                del self._given[source]
        last = set(self._last_waited.values())
        for account, book in list(self.accounts.items()):
            if not book.waiting and now - book.idle_since > lifetime and account not in last:
                del self.accounts[account]

    # ---- what instances and gateways are sent

    def update_for(self, source: Source) -> LedgerUpdate | None:
        """What a source lacks; None if nothing, or while its own copy is awaited."""
        given = self._given.get(source)
        if given is None or not given.ready:
            return None
        since = given.known if given.known >= self._first else 0
        if since == self.version:
            return None
        return self._update(since, given.applied)

    def _update(self, since: int, applied: Mapping[Account, float]) -> LedgerUpdate:
        return LedgerUpdate(
            version=self.version,
            since=since,
            lease=self.lease(),
            accounts=tuple(
                AccountState(
                    account,
                    book.counter,
                    bool(book.waiting),
                    self.policy(account[0]).weight,
                    applied.get(account, 0.0),
                )
                for account, book in self.accounts.items()
                if book.changed > since
            ),
            last_waited=tuple(self._last_waited.values()),
        )

    # ---- what waiting tenants are promised

    def lease(self) -> float:
        """Service by weight that an instance may charge per account unreported (L).

        Chosen so that what all others hide from one instance is at most its theta, where
        that leaves a lease worth the name: ``LEAST_LEASE``.
        """
        if self._lease is None:
            live = self._live()
            theta = max((given.theta for given in live), default=math.inf)
            least = LEAST_LEASE * max((given.increment for given in live), default=0.0)
            self._lease = max(least, theta / max(1, len(live) - 1))
        return self._lease

    def bound(self, request_class: RequestClass) -> float:
        """How far apart the counters of waiting accounts may be (G).

        theta + R + (K-1)(L + inc) + K*inc: preemption sets in at theta; each of the other
        instances hides a lease and a step; each gives one step before it looks again; and as
        much again as one instance hides goes to the run-ahead (R), until the dispatcher
        hears that a tenant is far enough ahead for another to preempt it.
        """
        live = self._live()
        weights = [self.policy(tenant).weight for tenant, _ in self.waiting(request_class)]
        least = min(weights, default=1.0)
        steps = [given.increment / least for given in live]
        theta = max((given.peak for given in live), default=0.0)
        most = max(steps, default=0.0)
        hidden = (len(live) - 1) * self.lease() + sum(steps) - most if len(live) > 1 else 0.0
        run_ahead = (self.lease() if live else 0.0) + most
        return theta + run_ahead + hidden + sum(steps)

    def gap(self, request_class: RequestClass) -> Gap:
        """How far apart the waiting accounts of a class are, and may be."""
        gap = self._spread(request_class)
        return Gap(gap, self.bound(request_class), len(self.waiting(request_class)))

    def apart(self) -> bool:
        """Whether tenants of a class that wait differ by more than half the least theta."""
        spread = max(self._spread(one) for one in RequestClass)
        if not spread:
            return False
        return spread > min((given.theta for given in self._live()), default=math.inf) / 2

    def _spread(self, request_class: RequestClass) -> float:
        counters = [self.counter(account) for account in self.waiting(request_class)]
        return max(counters) - min(counters) if counters else 0.0

    def knows(self, source: Source) -> bool:
        """Whether the source has reported and is not forgotten."""
        return source in self._given

    def applied(self, source: Source, account: Account) -> float:
        """Service that a source charged to an account, as far as the counter contains it."""
        given = self._given.get(source)
        return 0.0 if given is None else given.applied.get(account, 0.0)

    def theta(self, source: Source) -> float:
        """The theta that a source reported last; infinite before its first report."""
        given = self._given.get(source)
        return math.inf if given is None else given.theta

    def _live(self) -> list[Given]:
        return [
            given for given in self._given.values() if given.ended is None and given.increment > 0
        ]

    # ---- a new life

    def take_copy(self, copy: LedgerUpdate, source: Source, now: float) -> None:
        """A ledger of an earlier life comes back from an instance.

        The newest is what the counters are based on. Of the service that ``source`` reports,
        its own copy says how much earlier lives had counted. A copy of this life is no news.
        """
        if copy.version >= self._first:
            return
        if copy.version > self._base:
            self._rebase(copy, now)
        given = self._given.setdefault(source, Given())
        if given.ready:
            return
        given.ready = True
        for state in copy.accounts:
            known = given.applied.get(state.account, 0.0)
            given.applied[state.account] = max(known, state.applied)
        self._apply(given, now)

    def _rebase(self, copy: LedgerUpdate, now: float) -> None:
        """Base the counters on an earlier ledger, and keep what was charged on top of it."""
        self._base = copy.version
        named = set()
        for state in copy.accounts:
            book = self._book(state.account, now)
            added = book.service / self.policy(state.account[0]).weight
            book.counter = max(book.counter, state.counter + added)
            named.add(state.account)
            self._touch(book)
        for account in copy.last_waited:
            self._last_waited.setdefault(account[1], account)
        # Accounts that came up meanwhile have begun at 0, far behind those of the copy.
        for account, book in self.accounts.items():
            peers = [
                self.accounts[one].counter
                for one in named
                if one[1] == account[1] and self.accounts[one].waiting
            ]
            last = self._last_waited.get(account[1])
            level = min(peers) if peers else 0.0 if last is None else self.counter(last)
            if account not in named and level > book.counter:
                book.lifted += level - book.counter
                book.counter = level
                self._touch(book)

    def export_state(self) -> dict[str, Any]:
        """Counters, and what of each source they contain, ready for JSON."""
        return {
            "version": self.version,
            "accounts": [
                [tenant, request_class.name.lower(), book.counter]
                for (tenant, request_class), book in self.accounts.items()
            ],
            "last_waited": [
                [tenant, cls.name.lower()] for tenant, cls in self._last_waited.values()
            ],
            "applied": [
                [*source, tenant, request_class.name.lower(), applied]
                for source, given in self._given.items()
                for (tenant, request_class), applied in given.applied.items()
            ],
        }

    def restore_state(self, state: Mapping[str, Any], now: float) -> None:
        """Begin with the state of an earlier life; older than what is known, it is ignored.

        Raises:
            ValueError, KeyError, TypeError: It is not what ``export_state`` returns.
        """
        version = int(state["version"])
        copy = LedgerUpdate(
            version=version,
            since=0,
            lease=math.inf,
            accounts=tuple(
                AccountState((tenant, RequestClass[name.upper()]), float(counter), False, 1.0)
                for tenant, name, counter in state["accounts"]
            ),
            last_waited=tuple(
                (tenant, RequestClass[name.upper()]) for tenant, name in state["last_waited"]
            ),
        )
        if not self._base < version < self._first:
            return
        for instance_id, incarnation, tenant, name, applied in state["applied"]:
            given = self._given.setdefault(Source(instance_id, incarnation), Given())
            account = tenant, RequestClass[name.upper()]
            given.applied[account] = max(float(applied), given.applied.get(account, 0.0))
        self._rebase(copy, now)

    # ----

    def _book(self, account: Account, now: float) -> AccountBook:
        book = self.accounts.get(account)
        if book is None:
            book = self.accounts[account] = AccountBook(idle_since=now)
        return book

    def _touch(self, book: AccountBook) -> None:
        self.version += 1
        book.changed = self.version
