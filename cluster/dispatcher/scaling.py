"""How many instances there should be, and which is the one too many.

The freeness of the cluster, free KV after demand per request (Llumnix, section 4.4.4), is
kept within a band. An instance that is no longer wanted is emptied by migration before it
stops; if the load grows meanwhile, it stays. Whoever runs instances carries the orders out
and says how that ended; where it cannot, the next attempt waits longer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.dispatcher.views import InstanceState, LoadView
from instance.load import Role

START, STOP = "start", "stop"


@dataclass(frozen=True, slots=True)
class ScalingConfig:
    """When instances come and go.

    Attributes:
        min_instances: Instances at least.
        max_instances: Instances at most; 0 leaves their number as it is.
        low: Freeness, in KV blocks per request, below which there are too few.
        high: Freeness above which there are too many.
        period: Seconds for which freeness must be outside the band.
        cooldown: Seconds between two changes.
        start_timeout: Seconds in which an instance must have started.
        first_retry: Seconds after a failed start before the next attempt; doubled each time.
        last_retry: The longest of these.
    """

    min_instances: int = 1
    max_instances: int = 0
    low: float = 10.0
    high: float = 60.0
    period: float = 10.0
    cooldown: float = 30.0
    start_timeout: float = 600.0
    first_retry: float = 10.0
    last_retry: float = 300.0

    def __post_init__(self) -> None:
        if self.max_instances and not 1 <= self.min_instances <= self.max_instances:
            raise ValueError(
                f"no number of instances is at least {self.min_instances} (and 1) "
                f"and at most {self.max_instances}"
            )
        if not self.low < self.high:
            raise ValueError(f"the band from {self.low} to {self.high} is empty")

    @property
    def enabled(self) -> bool:
        """Whether instances come and go at all."""
        return self.max_instances > 0


def instance_name(number: int) -> str:
    """The id of an instance by its number, from 0 on."""
    return f"instance-{number}"


@dataclass(slots=True)
class _Order:
    """Something that was asked for and is not done."""

    what: str
    since: float


@dataclass(frozen=True, slots=True)
class _Failure:
    """A start that failed, and when."""

    instance_id: str
    why: str
    at: float


class Scaler:
    """Decides on the number of instances.

    Args:
        config: Settings.
        count: Counts an event of a kind under a reason.

    Attributes:
        leaving: Instances that are emptied to be stopped.
    """

    def __init__(self, config: ScalingConfig, count: Callable[[str, str, int], None]) -> None:
        self.config = config
        self.leaving: set[str] = set()
        self._count = count
        self._orders: dict[str, _Order] = {}
        self._outside: tuple[int, float] | None = None
        self._changed = -math.inf
        self._failures = 0
        self._failure: _Failure | None = None
        self._not_before = -math.inf

    def orders(self) -> dict[str, str]:
        """What is to be done: START or STOP by instance id. To do it twice does no harm."""
        return {name: order.what for name, order in self._orders.items()}

    def describe(self, now: float) -> dict[str, Any]:
        """What is wanted, under way and failing, ready for JSON.

        "failure" is the last start that failed, until one succeeds: instance, why, seconds
        since, and seconds until the next attempt at the earliest.
        """
        ages = {
            what: {name: now - one.since for name, one in self._orders.items() if one.what == what}
            for what in (START, STOP)
        }
        failure = self._failure
        return {
            "min_instances": self.config.min_instances,
            "max_instances": self.config.max_instances,
            "starting": ages[START],
            "stopping": ages[STOP],
            "leaving": sorted(self.leaving),
            "failure": None
            if failure is None
            else {
                "instance_id": failure.instance_id,
                "why": failure.why,
                "age": now - failure.at,
                "retry_in": max(0.0, self._not_before - now),
            },
        }

    def ended(self, instance_id: str, outcome: str, now: float) -> None:
        """An order was carried out, or could not be.

        Args:
            instance_id: Whose.
            outcome: "started", "stopped", or why not.
            now: The time.
        """
        order = self._orders.pop(instance_id, None)
        if order is None:
            return
        if order.what == STOP:
            # Nothing is left to be done there, well or not.
            self.leaving.discard(instance_id)
            self._count("scaling", "stopped", 1)
        elif outcome == "started":
            self._failures = 0
            self._failure = None
            self._count("scaling", "started", 1)
        else:
            self._failed(instance_id, outcome, now)

    def _failed(self, instance_id: str, why: str, now: float) -> None:
        self._failure = _Failure(instance_id, why, now)
        self._count("scaling", "failed", 1)
        if now < self._not_before:
            return  # another of those that were ordered together
        retry = min(self.config.first_retry * 2 ** min(self._failures, 16), self.config.last_retry)
        self._failures += 1
        self._not_before = now + retry

    def update(
        self,
        views: Sequence[LoadView],
        empty: Mapping[str, bool],
        demand: int,
        taken: Callable[[str], bool],
        now: float,
    ) -> None:
        """Look at the cluster; afterwards ``orders`` and ``leaving`` say what is wanted.

        Args:
            views: Instances that are not gone.
            empty: Whether nothing is on or on its way to each instance that is emptied.
            demand: KV blocks wanted by requests that wait for an instance with room.
            taken: Whether an instance of this id is or was known.
            now: The time.
        """
        present = {view.instance_id: view for view in views}
        self.leaving &= present.keys()
        self._follow_orders(present, empty, now)
        if not self.config.enabled:
            return
        staying = [view for view in views if view.state is not InstanceState.DRAINING]
        starting = [name for name, order in self._orders.items() if order.what == START]
        number = len(staying) + len(starting)
        if number < self.config.min_instances:
            self._more(present, staying, taken, now)
        elif number > self.config.max_instances:
            self._fewer(present, staying, now)
        else:
            self._keep_in_band(present, staying, starting, number, demand, taken, now)

    def _follow_orders(
        self, present: Mapping[str, LoadView], empty: Mapping[str, bool], now: float
    ) -> None:
        for name, order in list(self._orders.items()):
            if order.what == START and name in present:
                self.ended(name, "started", now)
            elif order.what == START and now - order.since > self.config.start_timeout:
                # Whoever tries still shall give up.
                self._orders[name] = _Order(STOP, now)
                self._failed(name, f"not ready within {self.config.start_timeout:g} s", now)
        for name in sorted(self.leaving):
            if empty.get(name, False) and name not in self._orders:
                self._orders[name] = _Order(STOP, now)

    def _keep_in_band(
        self,
        present: Mapping[str, LoadView],
        staying: Sequence[LoadView],
        starting: Sequence[str],
        number: int,
        demand: int,
        taken: Callable[[str], bool],
        now: float,
    ) -> None:
        free = cluster_freeness(staying, demand)
        side = -1 if free < self.config.low else 1 if free > self.config.high else 0
        if side == 0:
            self._outside = None
            return
        if self._outside is None or self._outside[0] != side:
            self._outside = side, now
        lasting = now - self._outside[1] >= self.config.period
        if not lasting or starting or now - self._changed < self.config.cooldown:
            return
        if side < 0:
            short = 1 if self._failures else shortage(staying, demand, self.config.low)
            for _ in range(min(short, self.config.max_instances - number)):
                self._more(present, staying, taken, now)
        elif side > 0 and number > self.config.min_instances:
            self._fewer(present, staying, now, demand)

    def _more(
        self,
        present: Mapping[str, LoadView],
        staying: Sequence[LoadView],
        taken: Callable[[str], bool],
        now: float,
    ) -> None:
        kept = [name for name in self.leaving if name not in self._orders]
        if kept:
            # The one that has most to do still has least to gain from leaving.
            name = max(kept, key=lambda name: (present[name].num_requests, name))
            self.leaving.remove(name)
            self._count("scaling", "kept", 1)
            self._changed = now
        elif now >= self._not_before:
            number = 0
            while taken(instance_name(number)) or instance_name(number) in self._orders:
                number += 1
            self._orders[instance_name(number)] = _Order(START, now)
            self._count("scaling", "wanted", 1)
            self._changed = now

    def _fewer(
        self,
        present: Mapping[str, LoadView],
        staying: Sequence[LoadView],
        now: float,
        demand: int | None = None,
    ) -> None:
        """Let the instance with fewest requests leave, if the rest can do without it."""
        spare = [view for view in staying if _dispensable(view, staying)]
        if not spare:
            return
        view = min(spare, key=lambda view: (view.num_requests, -_number(view), view.instance_id))
        if demand is not None:
            rest = [other for other in staying if other is not view]
            moved = view.total - view.free + sum(view.waiting)
            left = cluster_freeness(rest, demand + moved, view.num_requests)
            # As far from the lower edge as it was from the upper one, or it would come back.
            if left < (self.config.low + self.config.high) / 2:
                return
        self.leaving.add(view.instance_id)
        self._count("scaling", "leaving", 1)
        self._changed = now


def cluster_freeness(views: Sequence[LoadView], demand: int = 0, requests: int = 0) -> float:
    """Free KV blocks after demand per request, of the cluster as a whole.

    Unlike the mean over instances it is not swayed by one that is idle beside full ones,
    which rebalancing mends.

    Args:
        views: Instances that take requests.
        demand: Further KV blocks wanted.
        requests: Further requests.
    """
    slack = sum(view.free - view.headroom - sum(view.waiting) for view in views) - demand
    batch = sum(view.num_requests for view in views) + requests
    return slack / max(1, batch) if slack > 0 else float(slack)


def shortage(views: Sequence[LoadView], demand: int, low: float) -> int:
    """Instances that must be added for the freeness of the cluster to reach ``low``; at least 1.

    They are taken to be as large as the mean of those there are. Requests that are held wait
    longer for one start after the other than for several at once.

    Args:
        views: Instances that take requests.
        demand: Further KV blocks wanted.
        low: Freeness, in KV blocks per request.
    """
    if not views:
        return 1
    slack = sum(view.free - view.headroom - sum(view.waiting) for view in views) - demand
    batch = max(1, sum(view.num_requests for view in views))
    size = sum(view.total for view in views) / len(views)
    return max(1, math.ceil((low * batch - slack) / max(1.0, size)))


def _dispensable(view: LoadView, staying: Sequence[LoadView]) -> bool:
    """Whether another instance does what this one does."""
    return any(other is not view and other.role in (view.role, Role.MIXED) for other in staying)


def _number(view: LoadView) -> int:
    digits = view.instance_id.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else 0
