"""Large requests wait together: few instances keep room free for one that does not fit yet.

What does not fit into the memory of its instance keeps what is free there from those behind
it. New requests wait so at few instances (see ``binding``); but wherever one is preempted, it
is first in line and waits for as much as it had. All but the few that have waited longest go
to wait behind these instead, if somebody could run at once in the room they leave.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from cluster.dispatcher.evening import Order
from cluster.dispatcher.load import blocks_for
from cluster.dispatcher.queues import Held
from cluster.dispatcher.rebalance import Move, Round, compatible, suits
from cluster.dispatcher.views import InstanceState, LoadView
from instance.load import SequenceLoad
from instance.request import Account, RequestClass


class Line(Protocol):
    """What waits in the dispatcher."""

    @property
    def reservations(self) -> int | None:
        """Instances that may keep room free for a request that waits for more; None for all."""

    def in_front(self) -> Iterable[Held]:
        """The first of those held, in the order in which they are served."""


def plan_gathering(plan: Round, line: Line, order: Order) -> None:
    """Let large requests that wait do so at few instances.

    A move is worth the time that those who run at once instead are expected to wait
    otherwise: as long again as they have. Nobody gets in that the one who leaves goes before:
    none of a less urgent class, or of a tenant that has received more.
    """
    most = line.reservations
    if most is None:
        return
    waiting = [
        (name, head)
        for name, view in plan.views.items()
        if view.state is InstanceState.READY and (head := plan.stuck(view)) is not None
    ]
    if len(waiting) <= most:
        return
    waiting.sort(key=lambda item: (-plan.patience(item[1]), item[0]))
    queues = {name: len(plan.views[name].waiting) for name, _ in waiting[:most]}
    held = list(line.in_front())
    for name, head in waiting[most:]:
        view = plan.views[name]
        # What was computed of it, and is on the host, would have to come along.
        if head.uncomputed < head.num_tokens or not plan.may_gain(head):
            continue
        target = _queue_for(plan, view, head, queues)
        if target is None:
            continue
        taken, worth = _who_runs(plan, view, head, held, order)
        if worth - plan.cost(view, plan.views[target], head) > plan.config.min_gain:
            plan.add(Move(head, name, target, "defragment"), 0)
            queues[target] += 1
            held = [one for one in held if one not in taken]


def _queue_for(
    plan: Round, view: LoadView, head: SequenceLoad, queues: dict[str, int]
) -> str | None:
    """Where a request may wait: the shortest of the queues; None if at none of them."""
    if not plan.light_slot(view.instance_id):
        return None
    for name in sorted(queues, key=lambda one: (queues[one], one)):
        taker = plan.views[name]
        fits = head.blocks + 1 < taker.total
        if fits and plan.light_slot(name) and compatible(view, taker) and suits(taker, head):
            return name
    return None


def _who_runs(
    plan: Round, view: LoadView, head: SequenceLoad, held: list[Held], order: Order
) -> tuple[set[Held], float]:
    """Those that would run at once if ``head`` went: of the dispatcher's, and how long all of
    them have waited, in seconds."""

    def rank(account: Account) -> tuple[RequestClass, float]:
        return account[1], order.counter(account)

    size, own = view.info.model.block_size, rank(head.account)
    # A block stays free for each that runs.
    room = view.free - view.headroom - view.running
    taken: set[Held] = set()
    worth = 0.0
    for one in plan.sequences[view.instance_id]:
        if not one.running and one is not head and one.blocks < room and rank(one.account) <= own:
            room -= one.blocks + 1
            worth += plan.patience(one)
    for waiting in held:
        blocks = blocks_for(waiting.request.num_tokens + 1, size)
        if blocks < room and rank(waiting.account) <= own:
            room -= blocks + 1
            worth += plan.now - waiting.since
            taken.add(waiting)
    return taken, worth
