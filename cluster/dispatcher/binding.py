"""Late binding: at which instances a request runs at once, and where it may wait.

An instance is given what it can take up at once. Where no instance can, a request waits in the
dispatcher, but for a few: those in front are sent ahead, so that an instance never stands idle
for want of a message. A full instance is also given requests of a tenant, or class, that may
preempt what runs there.

What waits at an instance waits for that instance's memory, and nothing else goes there
meanwhile. That is what lets a large request run at all while smaller ones, behind it in the
line, run elsewhere: a reservation for the first in line, as in EASY backfilling (Lifka, "The
ANL/IBM SP scheduling system", JSSPP 1995). Each one costs the memory that it waits for, so
they are few.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from cluster.dispatcher.candidates import Candidates
from cluster.dispatcher.load import InstanceLoad
from cluster.dispatcher.table import Bools, Floats, Ints, LoadTable
from instance.load import InstanceInfo
from instance.request import Account, RequestClass

Counter = Callable[[Account], float]


class Binding:
    """Finds room, at one instant; make a new one for the next.

    Args:
        table: Loads of the instances.
        run_ahead: Requests that may wait at an instance; None for any number.
        ahead: Requests that may yet be sent to wait for memory, anywhere.
        counter: Counters of accounts.
        theta: How far ahead a tenant must be to be preempted at an instance.
        now: The instant.
    """

    def __init__(
        self,
        table: LoadTable,
        run_ahead: int | None,
        ahead: int,
        counter: Counter,
        theta: Callable[[InstanceInfo], float],
        now: float,
    ) -> None:
        self._table = table
        self._run_ahead = run_ahead
        self._ahead = ahead
        self._counter = counter
        self._theta = theta
        self._now = now
        self._most_slack: int | None = None
        self._may_wait: bool | None = None
        self._standing: _Standing | None = None

    def placed(self, ahead: bool) -> None:
        """A request was placed, ahead of the room for it or not."""
        self._most_slack = self._may_wait = self._standing = None
        self._ahead -= ahead

    def may_run(self, tokens: int) -> bool:
        """A quick answer for the many requests that cannot; true where it is not sure."""
        if self._run_ahead is None:
            return True
        if self._most_slack is None:
            self._most_slack = self._table.most_slack(self._now)
        return self._most_slack > tokens

    def hopeless(self, account: Account, tokens: int) -> bool:
        """A quick answer for the many queues that must wait: no instance takes a request of
        theirs in any way. False where it is not sure."""
        if self.may_run(tokens):
            return False
        if self._may_wait is None:
            most, full = self._run_ahead or 0, self._ahead <= 0
            self._may_wait = self._table.any_waits_below(most, full, self._now)
        return not self._may_wait and self._stand().preemptible(account) is None

    def to_run(self, candidates: Candidates, account: Account, tokens: int) -> Candidates | None:
        """Those of the instances that take up a request at once; None if none does.

        Headroom is what others leave as long as they have room elsewhere. A standard request
        takes it rather than wait, and may be moved away again: kept whatever waits, it would
        turn a cluster with memory to spare into one without. Batch requests wait.

        Args:
            account: Whose request it is.
            tokens: Tokens of it that are known.
        """
        if self._run_ahead is None:
            return candidates
        slack = candidates.slack
        found = None
        if account[1] != RequestClass.INTERACTIVE:
            found = self._if_any(candidates, slack > tokens, account, tokens)
        if found is None and account[1] != RequestClass.BATCH:
            slack = slack + candidates.headroom
            found = self._if_any(candidates, slack > tokens, account, tokens)
        return found

    def to_wait(self, candidates: Candidates, account: Account, tokens: int) -> Candidates | None:
        """Those at which a request may wait, for memory or for a slot of the batch, or None."""
        free = candidates.backlog < (self._run_ahead or 0)
        if self._ahead <= 0:
            free &= candidates.full_batch
        return self._if_any(candidates, free, account, tokens)

    def to_preempt(
        self, candidates: Candidates, account: Account, tokens: int
    ) -> Candidates | None:
        """Those that run what a request may preempt, or None."""
        allowed = self._stand().preemptible(account)
        if allowed is None:
            return None
        return self._if_any(candidates, allowed[candidates.rows], account, tokens)

    @staticmethod
    def _if_any(
        candidates: Candidates, free: Bools, account: Account, tokens: int
    ) -> Candidates | None:
        """Those that are free; of these, for an interactive request, such as run others of it.

        Every instance that runs one keeps its headroom free, so they share as long as they
        would leave it. The others' requests there end, or go away, and none follow.
        """
        count = np.count_nonzero(free)
        if not count:
            return None
        if account[1] == RequestClass.INTERACTIVE:
            shared = free & (candidates.shared_room > tokens)
            if shared.any():
                return candidates.where(shared)
        return candidates if count == len(candidates) else candidates.where(free)

    def _stand(self) -> _Standing:
        if self._standing is None:
            most = max(1, self._run_ahead or 0)
            self._standing = _Standing(self._table, self._counter, self._theta, most)
        return self._standing


class _Standing:
    """Who is ahead of whom at the instances, at one instant.

    Args:
        table: Loads of the instances.
        counter: Counters of accounts.
        theta: How far ahead a tenant must be to be preempted at an instance.
        most: Requests that may wait at an instance.
    """

    def __init__(
        self, table: LoadTable, counter: Counter, theta: Callable[[InstanceInfo], float], most: int
    ) -> None:
        self._table = table
        self._counter = counter
        self._most = most
        # [rows] the least urgent class of what runs there, and [classes, rows] the greatest
        # counter, less theta; then the greatest anywhere.
        self._lowest = np.full(table.size, -1)
        self._reach = np.full((len(RequestClass), table.size), -math.inf)
        for row in table.rows.values():
            self._write(row, table.load(row), theta)
        self._lowest_anywhere = self._lowest.max()
        self._reach_anywhere = self._reach.max(axis=1)
        self._first: tuple[Ints, Floats] | None = None

    def _write(self, row: int, load: InstanceLoad, theta: Callable[[InstanceInfo], float]) -> None:
        greatest: dict[int, float] = {}
        counter = self._counter
        for account in load.running_accounts:
            ahead = counter(account)
            if ahead >= greatest.get(account[1], -math.inf):
                greatest[account[1]] = ahead
        if greatest:
            least = theta(load.info)
            self._lowest[row] = max(greatest)
            for request_class, ahead in greatest.items():
                self._reach[request_class, row] = ahead - least

    def preemptible(self, account: Account) -> Bools | None:
        """[rows] those where an account may preempt, and fewer than may wait would do so before
        it; None where it may nowhere."""
        request_class, own = account[1], self._counter(account)
        if self._lowest_anywhere <= request_class and self._reach_anywhere[request_class] <= own:
            return None
        if self._first is None:
            self._first = self._first_in_line()
        first_class, first_counter = self._first
        goes_first = (first_class > request_class) | (
            (first_class == request_class) & (first_counter > own)
        )
        entitled = (self._lowest > request_class) | (self._reach[request_class] > own)
        found: Bools = entitled & goes_first
        return found

    def _first_in_line(self) -> tuple[Ints, Floats]:
        """[rows] class and counter of the last of the first who wait there, as many as may; where
        fewer wait, a class after all others."""
        classes = np.full(self._table.size, len(RequestClass))
        counters = np.zeros(self._table.size)
        counter, most = self._counter, self._most
        for row in self._table.rows.values():
            waiting = self._table.load(row).waiting_accounts
            if len(waiting) >= most:
                ranks = [(account[1], counter(account)) for account in waiting]
                classes[row], counters[row] = min(ranks) if most == 1 else sorted(ranks)[most - 1]
        return classes, counters
