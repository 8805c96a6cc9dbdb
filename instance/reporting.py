"""Tells the dispatcher what an instance holds: at least every so often, and soon after events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from instance.engine import Engine
from instance.figures import figures
from instance.kv.prefix_events import PrefixEvents
from instance.leases import LeasedCounters
from instance.load import InstanceInfo, LoadReport, MigrationFigures, Role, build_report

Reporter = Callable[[InstanceInfo | LoadReport], None]

_GATHER = 0.03
"""Seconds within which events share a report."""


class LoadReports:
    """The reports of one instance. To be used on its event loop.

    Args:
        instance_id, incarnation: Whose reports they are.
        engine: What is reported.
        counters: The instance's share of the ledger, which may have to be told at once.
        migrations: What of the load is on its way.
        interval: Seconds between two reports at most.
        reporter: Gets them; must not block. None: nobody does.

    Attributes:
        draining: Said in the reports: the instance shall get no more requests.
        role: Said in the reports: what the instance is for.
    """

    def __init__(
        self,
        instance_id: str,
        incarnation: str,
        engine: Engine,
        counters: LeasedCounters,
        migrations: Callable[[], MigrationFigures],
        interval: float,
        reporter: Reporter | None,
    ) -> None:
        self.draining = False
        self.role = Role.MIXED
        self._instance_id = instance_id
        self._incarnation = incarnation
        self._engine = engine
        self._counters = counters
        self._migrations = migrations
        self._interval = interval
        self._reporter = reporter
        self._prefixes = PrefixEvents()
        if engine.prefix_caching:
            engine.pool.prefix.watcher = self._prefixes
        self._number = 0
        self._told_of_waiting = False
        self._due = asyncio.Event()

    async def run(self) -> None:
        """Report until cancelled."""
        while True:
            # Not wait_for: before Python 3.12 it may swallow the cancellation that ends this.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval):
                    await self._due.wait()
            self._due.clear()
            if self._reporter is not None:
                self._reporter(self._load())
                if self._prefixes.pending:
                    self.soon()
            await asyncio.sleep(min(_GATHER, self._interval))

    def soon(self) -> None:
        """Something changed that the dispatcher should hear of."""
        self._due.set()

    def step_ended(self) -> None:
        """Whoever hands out requests must not wait to hear that nothing waits here any more."""
        emptied = self._told_of_waiting and not self._engine.scheduler.waiting
        if emptied or self._counters.due:
            self.soon()

    def tell_prefixes(self) -> None:
        """Report from now on as if nobody knew what the prefix cache holds."""
        self._prefixes.restart(self._engine.pool.prefix.keys())
        self.soon()

    def _load(self) -> LoadReport:
        self._number += 1
        scheduler = self._engine.scheduler
        self._told_of_waiting = bool(scheduler.waiting)
        return build_report(
            scheduler,
            self._migrations(),
            instance_id=self._instance_id,
            incarnation=self._incarnation,
            number=self._number,
            step_seconds=self._engine.step_seconds,
            draining=self.draining,
            figures=figures(self._engine),
            role=self.role,
            prefix=self._prefixes.take(),
        )
