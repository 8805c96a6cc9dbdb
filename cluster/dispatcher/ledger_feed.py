"""When instances are sent the ledger, and when theirs is wanted back."""

from __future__ import annotations

import math

from cluster.dispatcher.events import Action, FetchLedger, SendLedger
from cluster.dispatcher.fairness import FairnessLedger, Source
from instance.leases import LedgerUpdate, ServiceReport

LEAST_INTERVAL = 0.05
"""Seconds between two ledgers to an instance at least."""
PER_INSTANCE = 0.004
"""Seconds that the interval grows by with each instance, so that the dispatcher's share of
time spent on sending stays the same."""
FETCH_INTERVAL = 1.0


class LedgerFeed:
    """Sends each instance what is new in the ledger.

    An instance gets it after a report of its own; after one that was made because a lease was
    used up, or a change of weights, all do, for then the others' view is out of date.

    Args:
        ledger: What is sent.
    """

    def __init__(self, ledger: FairnessLedger) -> None:
        self._ledger = ledger
        self._sent: dict[Source, tuple[float, int]] = {}
        self._due: set[Source] = set()
        # When the one of these was sent a ledger that was sent none for longest, or earlier.
        self._oldest = math.inf
        self._fetched: dict[Source, float] = {}

    def reported(self, source: Source, report: ServiceReport, now: float) -> list[Action]:
        """Take what an instance charged; what it lacks is sent by ``send``."""
        self._ledger.resumed(source)
        if self._ledger.report(source, report, now):
            if now - self._fetched.get(source, -math.inf) < FETCH_INTERVAL:
                return []
            self._fetched[source] = now
            return [FetchLedger(source.instance_id)]
        self._sent.setdefault(source, (-math.inf, 0))
        if report.leased:
            self.all_due()
        else:
            self._add_due(source)
        return []

    def copied(self, source: Source, copy: LedgerUpdate, now: float) -> None:
        """An instance returned the ledger that it works with."""
        self._ledger.take_copy(copy, source, now)
        self._fetched.pop(source, None)
        self._sent.setdefault(source, (-math.inf, 0))
        self._add_due(source)

    def all_due(self) -> None:
        """Every instance shall have the ledger as it is now."""
        for source in self._sent:
            self._add_due(source)

    def _add_due(self, source: Source) -> None:
        self._due.add(source)
        self._oldest = min(self._oldest, self._sent[source][0])

    def gone(self, source: Source, now: float) -> None:
        """An incarnation has ended."""
        self._ledger.ended(source, now)
        self._sent.pop(source, None)
        self._due.discard(source)
        self._fetched.pop(source, None)

    def send(self, now: float) -> list[Action]:
        """What is to be sent now."""
        interval = max(LEAST_INTERVAL, PER_INSTANCE * len(self._sent))
        if not self._due or now - self._oldest < interval:
            return []
        actions: list[Action] = []
        self._oldest = math.inf
        for source in sorted(self._due):
            at, version = self._sent[source]
            if now - at < interval:
                self._oldest = min(self._oldest, at)
                continue
            self._due.discard(source)
            update = self._ledger.update_for(source)
            # Sent and not acknowledged by a report yet; the next report shows if it was lost.
            if update is not None and update.version != version:
                self._sent[source] = now, update.version
                actions.append(SendLedger(*source, update))
        return actions
