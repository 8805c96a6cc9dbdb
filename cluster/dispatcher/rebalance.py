"""Rebalancing: which requests move, from where to where, and whether that gains.

Llumnix (section 4.4.3) pairs instances below a low threshold of freeness with those above
a high one, whatever the move brings. Here a move is made only if it raises the lesser
freeness of the pair by more than it costs, so that moves cannot go back and forth while
the load stays the same: each one raises the sorted list of freenesses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from cluster.dispatcher.load import InstanceState, LoadView
from instance.load import SequenceLoad


@dataclass(frozen=True, slots=True)
class RebalanceConfig:
    """When to move running requests.

    Attributes:
        enabled: Move requests to balance load. Draining works regardless.
        interval: Seconds between rounds.
        hysteresis: The freest instance's freeness must exceed the least free one's by this
            share of it.
        min_gain: KV blocks that a move must gain beyond its cost, over the source's batch.
        cost_per_block: Cost of moving one KV block, in KV blocks of gain.
        request_cooldown: Seconds before a request that moved for balance may move again.
        pair_cooldown: Seconds before the same two instances are paired again.
        retry: Seconds before a request that could not leave a draining instance tries again.
        max_in_flight: Migrations under way at a time, over the cluster.
    """

    enabled: bool = True
    interval: float = 1.0
    hysteresis: float = 0.2
    min_gain: float = 1.0
    cost_per_block: float = 0.1
    request_cooldown: float = 10.0
    pair_cooldown: float = 2.0
    retry: float = 1.0
    max_in_flight: int = 4


@dataclass(frozen=True, slots=True)
class Move:
    """A request that shall migrate."""

    sequence: SequenceLoad
    source: str
    destination: str
    reason: str


@dataclass(slots=True)
class Cooldowns:
    """When requests moved and pairs were used last."""

    requests: dict[str, float] = field(default_factory=dict)
    pairs: dict[frozenset[str], float] = field(default_factory=dict)

    def note(self, move: Move, now: float) -> None:
        """A move was started."""
        self.requests[move.sequence.request_id] = now
        self.pairs[frozenset((move.source, move.destination))] = now

    def prune(self, now: float, config: RebalanceConfig) -> None:
        """Forget what no longer matters."""
        oldest = now - max(config.request_cooldown, config.retry)
        self.requests = {key: at for key, at in self.requests.items() if at > oldest}
        oldest = now - config.pair_cooldown
        self.pairs = {key: at for key, at in self.pairs.items() if at > oldest}

    def request_rests(self, request_id: str, now: float, seconds: float) -> bool:
        return now - self.requests.get(request_id, -math.inf) < seconds

    def pair_rests(self, one: str, other: str, now: float, seconds: float) -> bool:
        return now - self.pairs.get(frozenset((one, other)), -math.inf) < seconds


def compatible(source: LoadView, destination: LoadView) -> bool:
    """Whether KV of one instance means the same on the other."""
    return source.instance_id != destination.instance_id and (
        source.info.model == destination.info.model
    )


def without(view: LoadView, sequence: SequenceLoad, position: int | None) -> LoadView:
    """The load once ``sequence`` has gone; ``position`` is its place among the waiting."""
    if position is None:
        return replace(view, free=view.free + sequence.blocks, running=view.running - 1)
    waiting = view.waiting[:position] + view.waiting[position + 1 :]
    return replace(view, waiting=waiting)


def with_arrival(view: LoadView, sequence: SequenceLoad) -> LoadView:
    """The load once ``sequence`` has arrived; a waiting one would start to run."""
    return replace(view, free=view.free - sequence.blocks, running=view.running + 1)


def has_room(view: LoadView, blocks: int) -> bool:
    """Whether ``blocks`` and a batch slot are free, and nobody waits for them."""
    return (
        view.state is InstanceState.READY
        and not view.waiting
        and view.running < view.info.max_num_seqs
        and view.free - view.headroom > blocks
    )


def gain(
    source: LoadView,
    destination: LoadView,
    sequence: SequenceLoad,
    position: int | None,
    config: RebalanceConfig,
) -> float:
    """What a move brings beyond its cost, in KV blocks over the source's batch.

    The benefit is the rise of the lesser freeness of the two instances, times the
    sequences that enjoy it; the cost is the KV to move (none for a waiting sequence).
    """
    before = min(source.rebalancing_freeness(), destination.rebalancing_freeness())
    after = min(
        without(source, sequence, position).rebalancing_freeness(),
        with_arrival(destination, sequence).rebalancing_freeness(),
    )
    cost = config.cost_per_block * sequence.blocks if sequence.running else 0.0
    return (after - before) * max(1, source.running) - cost


def candidates(
    view: LoadView, sequences: Iterable[SequenceLoad]
) -> list[tuple[SequenceLoad, int | None]]:
    """Sequences in the order in which they should go, with their place among the waiting.

    Lowest class first, then least KV to move per block of relief (nothing for the first
    waiting one), then the shorter. Of the waiting only the first is a candidate: it alone
    counts in rebalancing freeness.
    """
    ordered: list[tuple[SequenceLoad, int | None]] = []
    waiting_seen = False
    for sequence in sequences:
        if sequence.running:
            ordered.append((sequence, None))
        elif not waiting_seen:
            waiting_seen = True
            if view.waiting:
                ordered.append((sequence, 0))
    ordered.sort(
        key=lambda item: (
            -item[0].request_class,
            item[1] is None,
            item[0].blocks,
            item[0].request_id,
        )
    )
    return ordered


def plan_balance(
    views: Sequence[LoadView],
    sequences: Mapping[str, Sequence[SequenceLoad]],
    barred: Set[str],
    cooldowns: Cooldowns,
    now: float,
    budget: int,
    config: RebalanceConfig,
) -> list[Move]:
    """Pair the least free instance with the freest, as long as that gains.

    Args:
        views: Instances whose load is settled enough to judge.
        sequences: By instance id, in the order of the report, those not on their way.
        barred: Requests that shall not move.
        budget: Moves at most.
    """
    ready = [view for view in views if view.state is InstanceState.READY]
    ready.sort(key=lambda view: (view.rebalancing_freeness(), view.instance_id))
    moves: list[Move] = []
    low, high = 0, len(ready) - 1
    while low < high and len(moves) < budget:
        source, destination = ready[low], ready[high]
        needed = source.rebalancing_freeness()
        needed += config.hysteresis * abs(needed)
        if destination.rebalancing_freeness() <= needed:
            break
        move = None
        rests = cooldowns.pair_rests(
            source.instance_id, destination.instance_id, now, config.pair_cooldown
        )
        if not rests and compatible(source, destination):
            move = _choose(source, destination, sequences, barred, cooldowns, now, config)
        if move is not None:
            moves.append(move)
            high -= 1
        low += 1
    return moves


def _choose(
    source: LoadView,
    destination: LoadView,
    sequences: Mapping[str, Sequence[SequenceLoad]],
    barred: Set[str],
    cooldowns: Cooldowns,
    now: float,
    config: RebalanceConfig,
) -> Move | None:
    for sequence, position in candidates(source, sequences[source.instance_id]):
        if sequence.migrating or sequence.request_id in barred:
            continue
        if not has_room(destination, sequence.blocks):
            continue
        if cooldowns.request_rests(sequence.request_id, now, config.request_cooldown):
            continue
        if gain(source, destination, sequence, position, config) > config.min_gain:
            return Move(sequence, source.instance_id, destination.instance_id, "balance")
    return None


def plan_drain(
    views: Sequence[LoadView],
    sequences: Mapping[str, Sequence[SequenceLoad]],
    barred: Set[str],
    cooldowns: Cooldowns,
    now: float,
    budget: int,
    config: RebalanceConfig,
) -> list[Move]:
    """Send the requests of draining instances to the freest that has room for each."""
    current = {view.instance_id: view for view in views}
    moves: list[Move] = []
    for view in views:
        if view.state is not InstanceState.DRAINING:
            continue
        for sequence in sequences[view.instance_id]:
            if len(moves) >= budget:
                return moves
            if sequence.migrating or sequence.request_id in barred:
                continue
            if cooldowns.request_rests(sequence.request_id, now, config.retry):
                continue
            target = best_destination(view, current.values(), sequence)
            if target is not None:
                moves.append(Move(sequence, view.instance_id, target.instance_id, "drain"))
                current[target.instance_id] = with_arrival(target, sequence)
    return moves


def best_destination(
    source: LoadView, views: Iterable[LoadView], sequence: SequenceLoad
) -> LoadView | None:
    """The freest other instance that is ready and has room, if any."""
    fitting = [
        view for view in views if compatible(source, view) and has_room(view, sequence.blocks)
    ]
    return max(
        fitting,
        key=lambda view: (view.rebalancing_freeness(), view.instance_id),
        default=None,
    )
