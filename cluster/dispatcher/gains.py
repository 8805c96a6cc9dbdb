"""Moves that are made for the room they bring: balance, defragment, isolate.

Llumnix (section 4.4.3) pairs instances below a low threshold of freeness with those above
a high one, whatever the move brings. Here a move is made only if its benefit exceeds its
cost, both in predicted seconds. Moves for balance lessen what all requests together are
expected to lose, so they cannot go back and forth while the load stays the same.
"""

from __future__ import annotations

from cluster.dispatcher.predicted import block_seconds
from cluster.dispatcher.rebalance import (
    Move,
    Round,
    best_destination,
    candidates,
    compatible,
    gain,
    has_room,
    spare,
    suits,
    with_arrival,
)
from cluster.dispatcher.views import LoadView
from instance.load import Role, SequenceLoad
from instance.request import RequestClass


def plan_balance(plan: Round) -> None:
    """Pair the least free instance with the freest, as long as that gains."""
    ready = sorted(plan.sources(), key=lambda view: (view.rebalancing_freeness(), view.instance_id))
    low, high = 0, len(ready) - 1
    while low < high and plan.budget > 0:
        source, destination = ready[low], ready[high]
        needed = source.rebalancing_freeness()
        needed += plan.config.hysteresis * abs(needed)
        if destination.rebalancing_freeness() <= needed:
            break
        if _balance(plan, source, destination):
            high -= 1
        low += 1


def _balance(plan: Round, source: LoadView, destination: LoadView) -> bool:
    names = source.instance_id, destination.instance_id
    if plan.cooldowns.pair_rests(*names, plan.now, plan.config.pair_cooldown):
        return False
    if not compatible(source, destination) or source.role is Role.PREFILL:
        return False
    for sequence, position in candidates(source, plan.sequences[source.instance_id]):
        if not plan.may_gain(sequence) or not suits(destination, sequence):
            continue
        if not has_room(destination, sequence):
            continue
        rise = gain(source, destination, sequence, position, plan.links, plan.config)
        if rise > plan.config.min_gain:
            plan.add(Move(sequence, *names, "balance"), position)
            return True
    return False


def plan_defragment(plan: Round) -> None:
    """Let a large waiting request run: where there is room, else where room can be made.

    It has waited for some time and is expected to wait as long again (Lindy's rule, for want
    of knowing when others end); that is what a move is worth at most.
    """
    for view in plan.sources():
        name = view.instance_id
        head = plan.stuck(view)
        if head is None or not plan.may_move(head, 0.0):
            continue
        worth = plan.patience(head) - plan.config.min_gain
        if plan.may_gain(head):
            target = plan.destination(view, head)
            if target is not None:
                if plan.cost(view, target, head) < worth:
                    plan.add(Move(head, name, target.instance_id, "defragment"), 0)
                continue
        _make_room(plan, view, head, worth)


def _make_room(plan: Round, view: LoadView, head: SequenceLoad, worth: float) -> None:
    """Move some of an instance's requests to where room is, if that suffices for ``head``."""
    name = view.instance_id
    need = head.blocks - spare(view, head) + 1
    movable = [s for s in plan.sequences[name] if s.running and plan.may_gain(s)]
    movable = [s for s in movable if s.request_class >= head.request_class]
    enough = [s for s in movable if s.blocks >= need]
    if enough:
        chosen = [min(enough, key=lambda s: (-s.request_class, s.blocks, s.request_id))]
    else:
        movable.sort(key=lambda s: (-s.request_class, -s.blocks, s.request_id))
        chosen = movable[: min(plan.config.defragment_moves, plan.budget, plan.slots[name])]
    if sum(s.blocks for s in chosen) < need:
        return
    others = {other.instance_id: other for other in plan.takers()}
    moves: list[Move] = []
    spent, gained = 0.0, 0
    for sequence in chosen:
        if gained >= need:
            break
        fits = (v for v in others.values() if suits(v, sequence))
        target = best_destination(view, fits, sequence)
        if target is None:
            return
        others[target.instance_id] = with_arrival(target, sequence)
        spent += plan.cost(view, target, sequence)
        gained += sequence.blocks
        moves.append(Move(sequence, name, target.instance_id, "defragment"))
    if spent < worth:
        for move in moves:
            plan.add(move)


def plan_isolate(plan: Round) -> None:
    """Move others away from interactive requests whose headroom is used up.

    A block of headroom is worth the time in which it would be filled.
    """
    for view in plan.sources():
        shortage = view.headroom - view.free
        if not view.headroom or shortage <= 0:
            continue
        for sequence, position in candidates(view, plan.sequences[view.instance_id]):
            if position is not None or sequence.request_class == RequestClass.INTERACTIVE:
                continue
            target = plan.destination(view, sequence) if plan.may_gain(sequence) else None
            if target is None:
                continue
            relief = min(shortage, sequence.blocks) * block_seconds(view)
            if relief - plan.cost(view, target, sequence) > plan.config.min_gain:
                plan.add(Move(sequence, view.instance_id, target.instance_id, "isolate"))
                break
