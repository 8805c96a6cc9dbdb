"""Moves that must be made: away from an instance that empties, and on after the prompt."""

from __future__ import annotations

from collections.abc import Set

from cluster.dispatcher.rebalance import Move, Round, best_destination, suits
from cluster.dispatcher.views import InstanceState, LoadView
from instance.load import Role, SequenceLoad


def plan_drain(plan: Round, leaving: Set[str]) -> None:
    """Send the requests of draining instances to the freest that has room for each.

    Args:
        plan: The round.
        leaving: Instances that empty because the cluster scales in.
    """
    for name, view in list(plan.views.items()):
        if view.state is InstanceState.DRAINING:
            reason = "scale_in" if name in leaving else "drain"
            for sequence in plan.sequences[name]:
                if not _move(plan, name, sequence, reason):
                    break


def plan_handoff(plan: Round) -> None:
    """Send requests whose prompt is computed from prefill instances to others.

    A request stays, and is decoded where it is, while no other instance has room.
    """
    for name, view in list(plan.views.items()):
        if view.role is not Role.PREFILL or view.state is not InstanceState.READY:
            continue
        for sequence in plan.sequences[name]:
            if (
                sequence.running
                and sequence.uncomputed <= 1
                and not _move(plan, name, sequence, "handoff")
            ):
                break


def _move(plan: Round, name: str, sequence: SequenceLoad, reason: str) -> bool:
    """Plan a move to the best place, if there is one; false if no more can start from here."""
    if not plan.free_slot(name):
        return False
    if plan.may_move(sequence, plan.config.retry):
        source = plan.views[name]
        takers = (view for view in plan.views.values() if _takes(plan, view, sequence, reason))
        target = best_destination(source, takers, sequence)
        if target is not None:
            position = None if sequence.running else _position(plan, name, sequence)
            plan.add(Move(sequence, name, target.instance_id, reason), position)
    return True


def _takes(plan: Round, view: LoadView, sequence: SequenceLoad, reason: str) -> bool:
    return plan.free_slot(view.instance_id) and (reason != "handoff" or suits(view, sequence))


def _position(plan: Round, name: str, sequence: SequenceLoad) -> int:
    """The place of a waiting sequence among those that still wait in this round."""
    waiting = [s for s in plan.sequences[name] if not s.running and not plan.moved(s)]
    return waiting.index(sequence)
