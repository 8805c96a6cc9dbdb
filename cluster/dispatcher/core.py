"""The dispatcher's policy: events in, actions out.

``Dispatcher.handle`` is the whole of it: no I/O, no clock, no threads. The Ray actor
(``actor.py``) and the simulator drive the same object.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.dispatcher.events import (
    Action,
    DrainRequested,
    Event,
    Finished,
    Joined,
    Left,
    MigrationEnded,
    MigrationRequested,
    Place,
    PlaceRequested,
    Refuse,
    Reported,
    ResumeRequested,
    SetDraining,
    Tick,
)
from cluster.dispatcher.load import (
    InstanceLoad,
    InstanceState,
    LoadConfig,
    LoadView,
    blocks_for,
)
from cluster.dispatcher.members import Members
from cluster.dispatcher.messages import ClusterView, Placement, PlaceRequest, Refusal
from cluster.dispatcher.migrations import Migrations
from cluster.dispatcher.overrides import DRAINING, Overrides, key
from cluster.dispatcher.persistence import info_to_json, infos_from_json
from cluster.dispatcher.placement import POLICIES, Uniform
from cluster.dispatcher.rebalance import RebalanceConfig
from instance.load import InstanceInfo, SequenceLoad


@dataclass(frozen=True, slots=True)
class DispatcherConfig:
    """Settings of the dispatcher.

    Attributes:
        placement: Name of the placement policy.
        hold_timeout: Seconds that a new request waits for an instance to be ready.
        replay_hold_timeout: The same for a replay, whose client already has tokens.
        max_held: New requests that wait at a time; more are refused.
        migration_timeout: Seconds after which a migration that nobody ended is forgotten.
        memory: Requests remembered, to answer repeated calls as before.
    """

    placement: str = "freeness"
    hold_timeout: float = 5.0
    replay_hold_timeout: float = 20.0
    max_held: int = 4096
    migration_timeout: float = 120.0
    memory: int = 65536
    load: LoadConfig = field(default_factory=LoadConfig)
    rebalance: RebalanceConfig = field(default_factory=RebalanceConfig)


@dataclass(slots=True)
class _Held:
    request: PlaceRequest
    since: float
    deadline: float


@dataclass(slots=True)
class _Known:
    """The newest thing known of a request: where it was placed, or that it ended."""

    epoch: int
    placement: Placement | None


class Dispatcher:
    """Knows the instances and their load, places requests and plans migrations.

    Args:
        config: Settings.
        rng: Source of numbers for the policies that draw.
        version: First version of the membership; must exceed those of earlier lives.

    Attributes:
        members: Instances, loads and migrations under way.
        migrations: Which requests move.
        overrides: What operators have set at run time.
        counters: Events by kind and reason, for metrics.

    Raises:
        ValueError: if the placement policy is unknown.
    """

    def __init__(self, config: DispatcherConfig, rng: Uniform, version: int = 1) -> None:
        if config.placement not in POLICIES:
            raise ValueError(
                f"unknown placement policy {config.placement!r}; known: {', '.join(POLICIES)}"
            )
        self.config = config
        self.members = Members(config.load, version)
        self.overrides = Overrides(version)
        self.counters: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        self._rng = rng
        self._policy = POLICIES[config.placement].choose
        self._held: dict[str, _Held] = {}
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._turn = 0
        self.migrations = Migrations(
            self.members, config.rebalance, config.migration_timeout, self._count, self._is_over
        )

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event; returns what is to be done, in order.

        Args:
            event: What happened.
            now: Monotonic seconds; must not decrease from call to call.
        """
        match event:
            case PlaceRequested(request):
                return self._place_requested(request, now)
            case Finished(request_id, epoch):
                return self._finished(request_id, epoch)
            case MigrationRequested(request_id, destination):
                return self.migrations.requested(request_id, destination, now)
            case MigrationEnded(ended):
                self.migrations.ended(ended, now)
                return []
            case Reported(report):
                self._count("reports", self.members.report(report, now))
                actions: list[Action] = []
            case Joined(info):
                actions = self._joined(info, now)
            case Left(instance_id, incarnation):
                actions = []
                if self.members.leave(instance_id, incarnation):
                    self._count("membership", "left")
            case DrainRequested(instance_id):
                self.overrides.set(key(DRAINING, instance_id), True)
                actions = self._set_draining(instance_id, True)
            case ResumeRequested(instance_id):
                self.overrides.set(key(DRAINING, instance_id), None)
                actions = self._set_draining(instance_id, False)
            case Tick():
                actions = self._tick(now)
        actions.extend(self._release_held(now))
        self.members.update_version(now)
        return actions

    def _joined(self, info: InstanceInfo, now: float) -> list[Action]:
        self._count("membership", self.members.join(info, now))
        if self.overrides.get(key(DRAINING, info.instance_id)):
            self.members.set_draining(info.instance_id, True)
        if self.members.loads[info.instance_id].draining:
            return [SetDraining(info.instance_id, True)]
        return []

    def _finished(self, request_id: str, epoch: int) -> list[Action]:
        actions: list[Action] = []
        held = self._held.get(request_id)
        if held is not None and held.request.epoch <= epoch:
            del self._held[request_id]
            actions.append(self._refuse(held.request, 404, "this request has ended"))
        known = self._known.get(request_id)
        if known is None or known.epoch <= epoch:
            self._remember(request_id, _Known(epoch, None))
        self.members.release(request_id, epoch)
        return actions

    # ---- placement

    def _place_requested(self, request: PlaceRequest, now: float) -> list[Action]:
        known = self._known.get(request.request_id)
        if known is not None and known.epoch > request.epoch:
            return [self._refuse(request, 404, "a newer epoch of this request is known")]
        if known is not None and known.epoch == request.epoch:
            placement = known.placement
            if placement is None:
                return [self._refuse(request, 404, "this request has ended")]
            if placement.instance_id not in request.avoid and self._stands(placement, now):
                self._count("placements", "repeated")
                return [Place(placement)]
        held = self._held.get(request.request_id)
        if held is not None:
            older, newer = held.request, request
            if newer.epoch < older.epoch:
                older, newer = newer, older
            held.request = newer
            if newer.epoch == older.epoch:
                return []
            return [self._refuse(older, 404, "a newer epoch of this request is known")]
        view = self._choose(request, now)
        if view is not None:
            return [self._assign(request, view, now)]
        replay = request.epoch > 1
        if not replay and len(self._held) >= self.config.max_held:
            return [self._refuse(request, 429, "too many requests wait for an instance")]
        patience = self.config.replay_hold_timeout if replay else self.config.hold_timeout
        self._held[request.request_id] = _Held(request, now, now + patience)
        self._count("placements", "held")
        return []

    def _stands(self, placement: Placement, now: float) -> bool:
        """Whether an earlier answer may be given again."""
        name = placement.instance_id
        return (
            self.members.knows(name, placement.incarnation)
            and self.members.state(name, now) is not InstanceState.GONE
        )

    def _choose(
        self, request: PlaceRequest, now: float, since: float | None = None
    ) -> LoadView | None:
        """The instance for a request, or None if none should take it now.

        An instance to avoid is taken only if it has been heard of after ``since``: then it
        lives. A suspect instance is better than none.
        """
        candidates = self.members.candidates(request, now, since)
        return None if candidates is None else self._policy(request, candidates, self._rng)

    def _assign(self, request: PlaceRequest, view: LoadView, now: float) -> Place:
        load = self.members.loads[view.instance_id]
        placement = Placement(
            request.request_id, request.epoch, view.instance_id, load.info.incarnation
        )
        self.members.release(request.request_id, request.epoch)
        load.charge(
            SequenceLoad(
                request_id=request.request_id,
                epoch=request.epoch,
                tenant=request.tenant,
                request_class=request.request_class,
                home=request.gateway_id,
                running=False,
                blocks=blocks_for(request.num_tokens + 1, load.info.model.block_size),
                num_tokens=request.num_tokens,
                uncomputed=request.num_tokens,
            ),
            now,
        )
        self._turn += 1
        self.members.placed(view.instance_id, self._turn)
        self._remember(request.request_id, _Known(request.epoch, placement))
        self._count("placements", "new" if request.epoch <= 1 else "replayed")
        return Place(placement)

    def _refuse(self, request: PlaceRequest, status: int, reason: str) -> Refuse:
        self._count("refusals", str(status))
        return Refuse(Refusal(request.request_id, request.epoch, status, reason))

    def _release_held(self, now: float) -> list[Action]:
        """Place held requests that can go now, in order of class and arrival."""
        actions: list[Action] = []
        order = sorted(
            self._held.values(),
            key=lambda held: (held.request.request_class, held.request.arrival),
        )
        for held in order:
            request = held.request
            view = self._choose(request, now, held.since)
            if view is not None:
                actions.append(self._assign(request, view, now))
            elif now >= held.deadline:
                actions.append(self._refuse(request, 503, "no instance is ready"))
            else:
                continue
            del self._held[request.request_id]
        return actions

    # ---- operators and time

    def _set_draining(self, instance_id: str, on: bool) -> list[Action]:
        load = self.members.loads.get(instance_id)
        if load is None:
            return []
        self.members.set_draining(instance_id, on)
        if not on and load.report is not None:
            # Its next report decides whether it still says that it drains.
            load.report = dataclasses.replace(load.report, draining=False)
        return [SetDraining(instance_id, on)]

    def _tick(self, now: float) -> list[Action]:
        expired = self.members.expire(now)
        if expired:
            self._count("charges", "expired", expired)
        return self.migrations.tick(now)

    # ---- what outlives the dispatcher

    def export_state(self, now: float) -> dict[str, Any]:
        """What a later dispatcher should begin with, ready for JSON, by section."""
        infos = [view.info for view in self.view(now).instances]
        return {
            "overrides": self.overrides.export(),
            "membership": [info_to_json(info) for info in infos],
        }

    def restore_state(self, state: Mapping[str, Any], now: float) -> list[Action]:
        """Take what an earlier dispatcher exported; what is known to be newer stays.

        Instances are suspect until they are heard of.
        """
        actions: list[Action] = []
        load = self.config.load
        silent = load.report_interval * load.suspect_intervals * 1.01
        for info in infos_from_json(state.get("membership")):
            if info.instance_id not in self.members.loads:
                self.members.join(info, now - silent)
        overrides = state.get("overrides")
        for name in self.overrides.merge(overrides if isinstance(overrides, dict) else {}):
            kind, _, rest = name.partition("/")
            if kind == DRAINING:
                actions.extend(self._set_draining(rest, bool(self.overrides.get(name))))
        self.members.update_version(now)
        return actions

    # ---- what is known

    def view(self, now: float) -> ClusterView:
        """Membership and load, for gateways and operators."""
        view = self.members.cluster_view(now)
        return dataclasses.replace(view, overrides=self.overrides.export())

    def locate(self, request_id: str, now: float) -> tuple[InstanceLoad, SequenceLoad] | None:
        """The instance that holds a request under its newest epoch, and what is known of it.

        A request that was placed and not yet reported is found where it was placed.
        """
        return self.migrations.locate(request_id, now)

    def requests(self, now: float) -> Iterator[tuple[InstanceLoad, SequenceLoad]]:
        """Every request and where it is: reported ones, then those charged only."""
        return self.migrations.requests(now)

    @property
    def num_held(self) -> int:
        """Requests that wait for an instance to be ready."""
        return len(self._held)

    def _is_over(self, sequence: SequenceLoad) -> bool:
        """Whether a sequence has ended, or is void because of a newer epoch."""
        known = self._known.get(sequence.request_id)
        if known is None:
            return False
        return known.epoch > sequence.epoch or (
            known.epoch == sequence.epoch and known.placement is None
        )

    def _remember(self, request_id: str, known: _Known) -> None:
        self._known[request_id] = known
        self._known.move_to_end(request_id)
        while len(self._known) > self.config.memory:
            self._known.popitem(last=False)

    def _count(self, kind: str, reason: str, number: int = 1) -> None:
        self.counters[kind][reason] += number
