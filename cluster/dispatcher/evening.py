"""Moves for fairness: waiting requests of tenants behind go where others would be served first.

A ledger alone keeps tenants together only where each instance has something of the tenant
that is to be served next. Late binding sees to that for what is still to be placed; these
moves do for what already waits at an instance, wherever a policy or a replay put it.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Protocol

from cluster.dispatcher.rebalance import Move, Round, compatible, has_room, suits
from cluster.dispatcher.views import InstanceState, LoadView
from instance.load import InstanceInfo, SequenceLoad
from instance.request import Account, RequestClass

_Waiting = tuple[str, SequenceLoad]
"""The instance at which a sequence waits, and the sequence."""


class Order(Protocol):
    """How far tenants are behind each other; what a fairness ledger knows."""

    def counter(self, account: Account) -> float:
        """Weighted service received."""

    def theta(self, info: InstanceInfo) -> float:
        """How far ahead a tenant must be to be preempted on an instance."""

    def apart(self) -> bool:
        """Whether tenants of a class that wait are far apart."""


def plan_fairness(plan: Round, order: Order) -> None:
    """Let instances take waiting requests of tenants of which nothing waits there.

    An instance takes one if it has room, or runs requests of others that are so far ahead
    that the tenant may preempt them, or if all that waits there is ahead of the tenant by
    half of that. Tenants are compared within a class, those furthest behind first. Such a
    request has no KV to move, so the loads need not stand still for it.
    """
    standing = _Standing(plan, order)
    waiting: dict[Account, list[_Waiting]] = {}
    queued: dict[str, set[Account]] = {}
    for name, view in plan.views.items():
        found = [one for one in plan.sequences[name] if not one.running]
        queued[name] = {one.account for one in found}.union(plan.expected[name])
        if view.state is InstanceState.READY and len(found) == len(view.waiting):
            for one in found:
                if not plan.moved(one):
                    waiting.setdefault(one.account, []).append((name, one))
    for account in sorted(waiting, key=lambda one: (one[1], order.counter(one), one[0])):
        left, left_at = _first_ones(plan, waiting[account])
        if not left:
            continue
        freest = sorted(
            plan.views.values(), key=lambda v: (v.rebalancing_freeness(), v.instance_id)
        )
        for name in [view.instance_id for view in reversed(freest)]:
            if account not in queued[name] and plan.light_slot(name):
                taken = _take(plan, plan.views[name], account, left, left_at, standing)
                if taken is not None:
                    left.remove(taken)
                    left_at[taken[0]] -= 1
                    queued[name].add(account)


def _first_ones(plan: Round, waiting: list[_Waiting]) -> tuple[list[_Waiting], Counter[str]]:
    """Those that may leave next, and how many of a tenant's requests wait at each instance.

    First those without KV anywhere, then those that have waited longest.
    """
    most = plan.config.max_light_per_instance

    def rank(item: _Waiting) -> tuple[bool, float, str]:
        sequence = item[1]
        started = sequence.uncomputed < sequence.num_tokens
        return started, -plan.patience(sequence), sequence.request_id

    taken: Counter[str] = Counter()
    first: list[_Waiting] = []
    for name, sequence in sorted(waiting, key=rank):
        if taken[name] < most and plan.may_gain(sequence):
            taken[name] += 1
            first.append((name, sequence))
    return first, Counter(name for name, _ in waiting)


class _Standing:
    """How far those are ahead that an instance runs, and those that wait there, by class.

    Neither changes within a round.
    """

    def __init__(self, plan: Round, order: Order) -> None:
        self._order = order
        self._ahead: dict[tuple[str, RequestClass], float] = {}
        self._behind: dict[tuple[str, RequestClass], float] = {}
        counter_of = functools.cache(order.counter)
        for name, sequences in plan.sequences.items():
            for one in sequences:
                counter, key = counter_of(one.account), (name, one.request_class)
                if one.running:
                    self._ahead[key] = max(counter, self._ahead.get(key, counter))
                else:
                    self._behind[key] = min(counter, self._behind.get(key, counter))

    def may_preempt(self, view: LoadView, account: Account) -> bool:
        """Whether an instance runs requests of a tenant that this one may preempt, and nobody
        waits there."""
        ahead = self._ahead.get((view.instance_id, account[1]))
        if view.waiting or ahead is None:
            return False
        return ahead > self._order.counter(account) + self._order.theta(view.info)

    def would_pass(self, view: LoadView, account: Account) -> bool:
        """Whether all that waits on an instance is of tenants well ahead of this one."""
        behind = self._behind.get((view.instance_id, account[1]))
        if behind is None:
            return False
        return behind > self._order.counter(account) + self._order.theta(view.info) / 2


def _take(
    plan: Round,
    taker: LoadView,
    account: Account,
    waiting: list[_Waiting],
    left_at: Counter[str],
    standing: _Standing,
) -> _Waiting | None:
    """Plan a move of one of a tenant's waiting requests to an instance; returns which."""
    if taker.state is not InstanceState.READY:
        return None
    preempts = standing.may_preempt(taker, account)
    passes = standing.would_pass(taker, account)
    if taker.waiting and not passes:
        return None
    for name, sequence in waiting:
        source = plan.views[name]
        # The last one there stays, unless it runs at once elsewhere.
        if not (passes and left_at[name] > 1) and not preempts and not has_room(taker, sequence):
            continue
        if not plan.light_slot(name) or not compatible(source, taker) or not suits(taker, sequence):
            continue
        if plan.patience(sequence) - plan.cost(source, taker, sequence) <= plan.config.min_gain:
            continue
        there = [s for s in plan.sequences[name] if not s.running and not plan.moved(s)]
        move = Move(sequence, name, taker.instance_id, "fairness")
        plan.add(move, there.index(sequence))
        return name, sequence
    return None
