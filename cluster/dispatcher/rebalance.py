"""Moves of requests between instances: what one costs and brings, and a round of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

from cluster.dispatcher.links import LinkRates
from cluster.dispatcher.predicted import lost_seconds
from cluster.dispatcher.views import InstanceState, LoadView
from instance.load import Role, SequenceLoad
from instance.request import Account, RequestClass


@dataclass(frozen=True, slots=True)
class RebalanceConfig:
    """When to move running requests.

    Attributes:
        enabled: Move requests for what it brings. Drains and handoffs work regardless.
        interval: Seconds between rounds.
        hysteresis: The freest instance's freeness must exceed the least free one's by this
            share of it.
        min_gain: Seconds that a move must gain beyond its cost.
        move_seconds: Cost of any move in seconds, beside the transfer of its KV.
        request_cooldown: Seconds before a request that moved for gain may move so again.
        pair_cooldown: Seconds before the same two instances are paired again.
        retry: Seconds before a request that could not leave where it must tries again.
        max_moves: Moves for gain that one request makes at most.
        max_in_flight: Migrations under way at a time, over the cluster.
        max_per_instance: The same, from and to one instance together.
        max_light_per_instance: The same for requests that wait and move for fairness.
        even_interval: Seconds between rounds for fairness while waiting tenants are apart.
        defragment_moves: Requests that move away at most to make room for a waiting one.
        llumnix_threshold: Remaining steps that divide sources from destinations, where
            Llumnix's rules are in force.
    """

    enabled: bool = True
    interval: float = 1.0
    hysteresis: float = 0.2
    min_gain: float = 0.2
    move_seconds: float = 0.05
    request_cooldown: float = 10.0
    pair_cooldown: float = 2.0
    retry: float = 1.0
    max_moves: int = 8
    max_in_flight: int = 16
    max_per_instance: int = 2
    max_light_per_instance: int = 4
    even_interval: float = 0.1
    defragment_moves: int = 3
    llumnix_threshold: float = 3.0


@dataclass(frozen=True, slots=True)
class Move:
    """A request that shall migrate."""

    sequence: SequenceLoad
    source: str
    destination: str
    reason: str


@dataclass(slots=True)
class Cooldowns:
    """When requests moved and pairs were used last, and how often requests moved for gain."""

    requests: dict[str, float] = field(default_factory=dict)
    pairs: dict[frozenset[str], float] = field(default_factory=dict)
    moves: Counter[str] = field(default_factory=Counter)

    def note(self, move: Move, now: float, for_gain: bool) -> None:
        """A move was started."""
        self.requests[move.sequence.request_id] = now
        if for_gain and move.sequence.running:
            self.pairs[frozenset((move.source, move.destination))] = now
        if for_gain:
            self.moves[move.sequence.request_id] += 1

    def prune(self, now: float, config: RebalanceConfig, present: Callable[[str], bool]) -> None:
        """Forget what no longer matters."""
        oldest = now - max(config.request_cooldown, config.retry)
        self.requests = {key: at for key, at in self.requests.items() if at > oldest}
        oldest = now - config.pair_cooldown
        self.pairs = {key: at for key, at in self.pairs.items() if at > oldest}
        for request_id in [key for key in self.moves if not present(key)]:
            del self.moves[request_id]

    def request_rests(self, request_id: str, now: float, seconds: float) -> bool:
        """Whether a request moved less than ``seconds`` ago."""
        return now - self.requests.get(request_id, -math.inf) < seconds

    def pair_rests(self, one: str, other: str, now: float, seconds: float) -> bool:
        """Whether two instances were paired less than ``seconds`` ago."""
        return now - self.pairs.get(frozenset((one, other)), -math.inf) < seconds


# ---- one move


def compatible(source: LoadView, destination: LoadView) -> bool:
    """Whether KV of one instance means the same on the other."""
    return source.instance_id != destination.instance_id and (
        source.info.model == destination.info.model
    )


def suits(view: LoadView, sequence: SequenceLoad) -> bool:
    """Whether an instance of its role does what a sequence needs next."""
    other = Role.DECODE if not sequence.running or sequence.uncomputed > 1 else Role.PREFILL
    return view.role is not other


def without(view: LoadView, sequence: SequenceLoad, position: int | None) -> LoadView:
    """The load once ``sequence`` has gone; ``position`` is its place among the waiting."""
    if position is None:
        return view._replace(
            free=view.free + sequence.blocks,
            running=view.running - 1,
            interactive=view.interactive - _is_interactive(sequence),
            interactive_blocks=view.interactive_blocks
            - _is_interactive(sequence) * sequence.blocks,
        )
    waiting = view.waiting[:position] + view.waiting[position + 1 :]
    return view._replace(waiting=waiting)


def with_arrival(view: LoadView, sequence: SequenceLoad) -> LoadView:
    """The load once ``sequence`` has arrived; a waiting one would start to run."""
    return view._replace(
        free=view.free - sequence.blocks,
        running=view.running + 1,
        interactive=view.interactive + _is_interactive(sequence),
        interactive_blocks=view.interactive_blocks + _is_interactive(sequence) * sequence.blocks,
    )


def _is_interactive(sequence: SequenceLoad) -> bool:
    return sequence.request_class == RequestClass.INTERACTIVE


def spare(view: LoadView, sequence: SequenceLoad) -> int:
    """Free blocks that a sequence may take: headroom is there for interactive ones alone."""
    return view.free if _is_interactive(sequence) else view.free - view.headroom


def has_room(view: LoadView, sequence: SequenceLoad) -> bool:
    """Whether blocks and a batch slot are free for a sequence, and nobody waits for them."""
    return (
        view.state is InstanceState.READY
        and not view.waiting
        and view.running < view.info.max_num_seqs
        and spare(view, sequence) > sequence.blocks
    )


def cost(
    source: LoadView,
    destination: LoadView,
    sequence: SequenceLoad,
    links: LinkRates,
    config: RebalanceConfig,
) -> float:
    """Seconds that a move costs; a waiting sequence has no KV to transfer."""
    blocks = sequence.blocks if sequence.running else 0
    return config.move_seconds + links.seconds(source.info, destination.info, blocks)


def gain(
    source: LoadView,
    destination: LoadView,
    sequence: SequenceLoad,
    position: int | None,
    links: LinkRates,
    config: RebalanceConfig,
) -> float:
    """What a move for balance brings beyond its cost, in seconds.

    The benefit is what all requests of the two instances together are expected to lose less.
    """
    costs = source.costs
    before = lost_seconds(source, costs) + lost_seconds(destination, costs)
    after = lost_seconds(without(source, sequence, position), costs)
    after += lost_seconds(with_arrival(destination, sequence), costs)
    return before - after - cost(source, destination, sequence, links, config)


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


def best_destination(
    source: LoadView, views: Iterable[LoadView], sequence: SequenceLoad
) -> LoadView | None:
    """The freest other instance that is ready and has room, if any; one that suits first."""
    fitting = [view for view in views if compatible(source, view) and has_room(view, sequence)]
    return max(
        fitting,
        key=lambda view: (
            suits(view, sequence),
            view.rebalancing_freeness(),
            view.instance_id,
        ),
        default=None,
    )


# ---- a round


@dataclass(slots=True)
class Round:
    """The moves planned at one instant; every move is seen by those planned after it.

    Attributes:
        views: By instance id, as if the moves so far were made.
        sequences: By instance id, in the order of the report, those not on their way.
        settled: Instances whose load is known well enough to move requests for gain.
        barred: Whether a request has ended, or is void, and shall not move.
        waited: Since when each waiting request has been seen waiting.
        slots: Migrations that may still be started from or to each instance.
        budget: Moves that may still be added.
        expected: By instance id, whose requests are on their way there.
        moves: Those added.
    """

    views: dict[str, LoadView]
    sequences: Mapping[str, Sequence[SequenceLoad]]
    settled: Set[str]
    barred: Callable[[SequenceLoad], bool]
    waited: Mapping[str, float]
    cooldowns: Cooldowns
    links: LinkRates
    config: RebalanceConfig
    now: float
    slots: Counter[str]
    budget: int
    expected: Mapping[str, Set[Account]] = field(default_factory=dict)
    moves: list[Move] = field(default_factory=list)
    _moved: set[str] = field(default_factory=set)
    _takers: list[LoadView] | None = None

    def add(self, move: Move, position: int | None = None) -> None:
        """Plan a move; ``position`` is the sequence's place among the waiting."""
        self.moves.append(move)
        self.budget -= 1
        self._takers = None
        self._moved.add(move.sequence.request_id)
        for name in (move.source, move.destination):
            self.slots[name] -= 1
        source = self.views[move.source]
        self.views[move.source] = without(source, move.sequence, position)
        self.views[move.destination] = with_arrival(self.views[move.destination], move.sequence)

    def moved(self, sequence: SequenceLoad) -> bool:
        """Whether this round moves a request."""
        return sequence.request_id in self._moved

    def stuck(self, view: LoadView) -> SequenceLoad | None:
        """The first that waits at an instance, if it does for memory that is not free, and no
        move was planned for it."""
        if not view.waiting:
            return None
        first = next((s for s in self.sequences[view.instance_id] if not s.running), None)
        if first is None or self.moved(first) or first.blocks <= spare(view, first):
            return None
        return first

    def free_slot(self, name: str) -> bool:
        """Whether one more migration from or to an instance may start."""
        return self.budget > 0 and self.slots[name] > 0

    def light_slot(self, name: str) -> bool:
        """The same for the move of a request that waits."""
        more = self.config.max_light_per_instance - self.config.max_per_instance
        return self.budget > 0 and self.slots[name] + more > 0

    def may_move(self, sequence: SequenceLoad, rest: float) -> bool:
        """Whether a request is free to go, its last move being ``rest`` seconds ago."""
        return not (
            sequence.migrating
            or sequence.request_id in self._moved
            or self.barred(sequence)
            or self.cooldowns.request_rests(sequence.request_id, self.now, rest)
        )

    def may_gain(self, sequence: SequenceLoad) -> bool:
        """Whether a request is free to go for what it brings."""
        return (
            self.may_move(sequence, self.config.request_cooldown)
            and self.cooldowns.moves[sequence.request_id] < self.config.max_moves
        )

    def sources(self) -> list[LoadView]:
        """Ready instances, known well enough, from or to which a move for gain may start."""
        return [
            view
            for name, view in self.views.items()
            if view.state is InstanceState.READY and name in self.settled and self.free_slot(name)
        ]

    def takers(self) -> list[LoadView]:
        """Instances that may take what moves for gain, and where nobody waits; the freest first."""
        if self._takers is None:
            there = [view for view in self.sources() if not view.waiting]
            there.sort(key=lambda v: (v.rebalancing_freeness(), v.instance_id), reverse=True)
            self._takers = there
        return self._takers

    def destination(self, source: LoadView, sequence: SequenceLoad) -> LoadView | None:
        """Where a sequence that moves for gain goes best, if anywhere."""
        fitting = (
            view
            for view in self.takers()
            if suits(view, sequence) and compatible(source, view) and has_room(view, sequence)
        )
        found = next(fitting, None)
        if found is None or self.cooldowns.pair_rests(
            source.instance_id, found.instance_id, self.now, self.config.pair_cooldown
        ):
            return None
        return found

    def patience(self, sequence: SequenceLoad) -> float:
        """Seconds for which a waiting request will likely wait on: as long as it has waited."""
        return self.now - self.waited.get(sequence.request_id, self.now)

    def cost(self, source: LoadView, destination: LoadView, sequence: SequenceLoad) -> float:
        """Seconds that a move costs."""
        return cost(source, destination, sequence, self.links, self.config)
