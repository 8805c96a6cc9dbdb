"""Moves for fairness: waiting requests of tenants behind go where others would be served first.

A ledger alone keeps tenants together only where each instance has something of the tenant
that is to be served next. Late binding sees to that for what is still to be placed; these
moves do for what already waits at an instance, wherever a policy or a replay put it.
"""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from cluster.dispatcher.rebalance import Move, Round, compatible, has_room, suits
from cluster.dispatcher.views import InstanceState, LoadView
from instance.load import InstanceInfo, SequenceLoad
from instance.request import Account

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
        freest = sorted(
            plan.views.values(), key=lambda v: (v.rebalancing_freeness(), v.instance_id)
        )
        for name in [view.instance_id for view in reversed(freest)]:
            if account not in queued[name] and plan.light_slot(name):
                taken = _take(plan, plan.views[name], left, left_at, order)
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


def _take(
    plan: Round,
    taker: LoadView,
    waiting: list[_Waiting],
    left_at: Counter[str],
    order: Order,
) -> _Waiting | None:
    """Plan a move of one of a tenant's waiting requests to an instance; returns which."""
    if taker.state is not InstanceState.READY:
        return None
    for name, sequence in waiting:
        source = plan.views[name]
        if not plan.light_slot(name) or not compatible(source, taker) or not suits(taker, sequence):
            continue
        at_once = has_room(taker, sequence) or _may_preempt(plan, taker, sequence, order)
        # The last one there stays, unless it runs at once elsewhere.
        if not at_once and (left_at[name] < 2 or not _would_pass(plan, taker, sequence, order)):
            continue
        if plan.patience(sequence) - plan.cost(source, taker, sequence) <= plan.config.min_gain:
            continue
        there = [s for s in plan.sequences[name] if not s.running and not plan.moved(s)]
        move = Move(sequence, name, taker.instance_id, "fairness")
        plan.add(move, there.index(sequence))
        return name, sequence
    return None


def _would_pass(plan: Round, view: LoadView, sequence: SequenceLoad, order: Order) -> bool:
    """Whether all that waits on an instance is of tenants well ahead of the sequence's."""
    reach = order.counter(sequence.account) + order.theta(view.info) / 2
    there = [
        other
        for other in plan.sequences.get(view.instance_id, ())
        if not other.running and other.request_class == sequence.request_class
    ]
    return bool(there) and all(order.counter(other.account) > reach for other in there)


def _may_preempt(plan: Round, view: LoadView, sequence: SequenceLoad, order: Order) -> bool:
    if view.waiting:
        return False
    reach = order.counter(sequence.account) + order.theta(view.info)
    return any(
        other.running
        and other.request_class == sequence.request_class
        and order.counter(other.account) > reach
        for other in plan.sequences[view.instance_id]
    )
