"""Late binding: which instances have room for a request now.

An instance is given what it can take up at once, and a small run-ahead beyond that, so that
it never stands idle while requests wait in the dispatcher. A full instance still has room for
requests of a tenant, or class, that may preempt what runs there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from cluster.dispatcher.candidates import Candidates
from cluster.dispatcher.load import InstanceLoad
from cluster.dispatcher.table import LoadTable
from instance.load import InstanceInfo, SequenceLoad
from instance.request import Account, RequestClass

Counter = Callable[[Account], float]


class Binding:
    """Finds room, at one instant; make a new one for the next.

    Args:
        table: Loads of the instances.
        run_ahead: Requests that may wait at an instance; None for any number.
        counter: Counters of accounts.
        theta: How far ahead a tenant must be to be preempted at an instance.
        now: The instant.
    """

    def __init__(
        self,
        table: LoadTable,
        run_ahead: int | None,
        counter: Counter,
        theta: Callable[[InstanceInfo], float],
        now: float,
    ) -> None:
        self._table = table
        self._run_ahead = run_ahead
        self._counter = counter
        self._theta = theta
        self._now = now
        self._best: tuple[int, int] | None = None
        self._reach: dict[int, float] | None = None

    def changed(self) -> None:
        """A request was placed."""
        self._best = None

    def may_have_room(self, account: Account, tokens: int) -> bool:
        """A quick answer for the many requests that have none; true where it is not sure."""
        most = self._run_ahead
        if most is None:
            return True
        if self._best is None:
            self._best = self._table.most_room(self._now) or (-1, most)
        slack, backlog = self._best
        return slack > tokens or backlog < most or self._may_preempt_somewhere(account)

    def with_room(self, candidates: Candidates, account: Account, tokens: int) -> Candidates | None:
        """Those of the instances with room for a request; None if none has.

        They can take it up, or have little waiting; if there are none, they run what it may
        preempt.

        Args:
            account: Whose request it is.
            tokens: Tokens of it that are known.
        """
        most = self._run_ahead
        if most is None:
            return candidates
        slack = candidates.slack
        if account[1] == RequestClass.INTERACTIVE:
            slack = np.where(slack < 0, slack, slack + candidates.headroom)
        open_now = (slack > tokens) | (candidates.backlog < most)
        if account[1] != RequestClass.INTERACTIVE and open_now.all():
            return candidates
        if not open_now.any():
            if not self._may_preempt_somewhere(account):
                return None
            loads = [self._table.load(row) for row in candidates.rows]
            open_now = np.array([self._preempts(load, account, max(1, most)) for load in loads])
            if not open_now.any():
                return None
        if account[1] == RequestClass.INTERACTIVE:
            # Every instance that runs one keeps its headroom free, so they share as long as
            # they would leave it. The others' requests there end, or go away, and none follow.
            shared = open_now & (candidates.shared_room > tokens)
            if shared.any():
                open_now = shared
        return candidates if open_now.all() else candidates.where(open_now)

    def _may_preempt_somewhere(self, account: Account) -> bool:
        if self._reach is None:
            self._reach = {}
            for load in self._table.loads():
                theta = self._theta(load.info)
                for tenant, request_class in load.running_accounts:
                    reach = self._counter((tenant, request_class)) - theta
                    known = self._reach.get(request_class, -math.inf)
                    self._reach[request_class] = max(reach, known)
        own = self._counter(account)
        return any(
            other > account[1] or (other == account[1] and reach > own)
            for other, reach in self._reach.items()
        )

    def _preempts(self, load: InstanceLoad, account: Account, most: int) -> bool:
        """Whether it may preempt there, and fewer than ``most`` would do so before it."""
        own = self._counter(account)
        limit = own + self._theta(load.info)
        if not any(
            one[1] > account[1] or (one[1] == account[1] and self._counter(one) > limit)
            for one in load.running_accounts
        ):
            return False
        return sum(self._precedes(one, account, own) for one in load.to_wait()) < most

    def _precedes(self, sequence: SequenceLoad, account: Account, own: float) -> bool:
        other = sequence.account
        return other[1] < account[1] or (other[1] == account[1] and self._counter(other) <= own)
