"""Placement policies: which instance a request goes to, as functions of the loads.

A policy gets the request, the instances that may take it (never empty) and a source of
uniform numbers, and returns one of the instances.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from cluster.dispatcher.load import LoadView
from cluster.dispatcher.messages import PlaceRequest


class Uniform(Protocol):
    """A seeded source of numbers; ``random.Random`` is one."""

    def random(self) -> float:
        """A number in [0, 1)."""


PlacementPolicy = Callable[[PlaceRequest, Sequence[LoadView], Uniform], LoadView]


def _occupancy(view: LoadView) -> tuple[float, int, int, str]:
    """Order by used or promised share of KV; ties by requests, then by turn."""
    used = view.total - view.free + sum(view.waiting)
    return used / max(1, view.total), view.num_requests, view.last_placed, view.instance_id


def freeness(request: PlaceRequest, views: Sequence[LoadView], rng: Uniform) -> LoadView:
    """The highest freeness (Llumnix, section 4.4); ties by requests, then by turn."""
    return min(
        views,
        key=lambda view: (
            -view.placement_freeness(),
            view.num_requests,
            view.last_placed,
            view.instance_id,
        ),
    )


def least_loaded(request: PlaceRequest, views: Sequence[LoadView], rng: Uniform) -> LoadView:
    """The smallest share of KV blocks used, promised or waited for."""
    return min(views, key=_occupancy)


def power_of_two(request: PlaceRequest, views: Sequence[LoadView], rng: Uniform) -> LoadView:
    """The less loaded of two different instances drawn at random."""
    first = int(rng.random() * len(views))
    if len(views) == 1:
        return views[0]
    second = (first + 1 + int(rng.random() * (len(views) - 1))) % len(views)
    return min((views[first], views[second]), key=_occupancy)


def round_robin(request: PlaceRequest, views: Sequence[LoadView], rng: Uniform) -> LoadView:
    """The instance whose last placement is longest ago."""
    return min(views, key=lambda view: (view.last_placed, view.instance_id))


def random(request: PlaceRequest, views: Sequence[LoadView], rng: Uniform) -> LoadView:
    """Any instance, with equal chances."""
    return views[int(rng.random() * len(views))]


POLICIES: dict[str, PlacementPolicy] = {
    "freeness": freeness,
    "least_loaded": least_loaded,
    "power_of_two": power_of_two,
    "round_robin": round_robin,
    "random": random,
}
