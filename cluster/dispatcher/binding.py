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
from cluster.dispatcher.table import Bools, LoadTable
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
        self._standing: _Preemptible | None = None

    def placed(self, ahead: bool) -> None:
        """A request was placed, ahead of the room for it or not."""
        self._most_slack = self._standing = None
        self._ahead -= ahead

    def may_run(self, tokens: int) -> bool:
        """A quick answer for the many requests that cannot; true where it is not sure."""
        if self._run_ahead is None:
            return True
        if self._most_slack is None:
            self._most_slack = self._table.most_slack(self._now)
        return self._most_slack > tokens

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
        allowed = self._preemptible().by(account, self._counter(account))
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

    def _preemptible(self) -> _Preemptible:
        if self._standing is None:
            table = self._table
            most = max(1, self._run_ahead or 0)
            found = _Preemptible(table.size)
            for row in table.rows.values():
                load = table.load(row)
                found.put(row, load, self._counter, self._theta(load.info), most)
            self._standing = found
        return self._standing


class _Preemptible:
    """Of every instance: how far ahead is what runs there, and who goes before others.

    Args:
        size: Rows of the table.

    Attributes:
        lowest_class: [size] the least urgent class of what runs there; -1 for nothing.
        reach: [classes, size] the greatest counter of what runs there, less theta.
        first_class: [size] class of the last of the first in line there, as many as may wait;
            beyond all classes where fewer wait.
        first_counter: [size] the counter of its account.
    """

    def __init__(self, size: int) -> None:
        self.lowest_class = np.full(size, -1)
        self.reach = np.full((len(RequestClass), size), -math.inf)
        self.first_class = np.full(size, len(RequestClass))
        self.first_counter = np.zeros(size)

    def put(self, row: int, load: InstanceLoad, counter: Counter, theta: float, most: int) -> None:
        """Write an instance's row; ``most`` may wait there."""
        reach: dict[int, float] = {}
        for account in load.running_accounts:
            ahead = counter(account) - theta
            if ahead >= reach.get(account[1], -math.inf):
                reach[account[1]] = ahead
        for request_class, ahead in reach.items():
            self.reach[request_class, row] = ahead
        self.lowest_class[row] = max(reach, default=-1)
        waiting = load.waiting_accounts
        if len(waiting) >= most:
            ranks = [(account[1], counter(account)) for account in waiting]
            self.first_class[row], self.first_counter[row] = sorted(ranks)[most - 1]

    def by(self, account: Account, own: float) -> Bools:
        """[size] those where an account of this counter may preempt, and fewer than may wait
        would do so before it."""
        request_class = account[1]
        lower = self.lowest_class > request_class
        goes_first = (self.first_class > request_class) | (
            (self.first_class == request_class) & (self.first_counter > own)
        )
        entitled: Bools = (lower | (self.reach[request_class] > own)) & goes_first
        return entitled
