"""Placement policies: which instance a request goes to, as functions of the loads.

A policy gets the request, the instances that may take it (never empty) and a source of
uniform numbers, and returns one of the instances. ``POLICIES`` names those that exist;
users add their own by file (``cluster/user_policy.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cluster.dispatcher.candidates import Candidates
from cluster.dispatcher.llumnix import remaining_steps
from cluster.dispatcher.messages import PlaceRequest
from cluster.dispatcher.views import LoadView


class Uniform(Protocol):
    """A seeded source of numbers; ``random.Random`` is one."""

    def random(self) -> float:
        """A number in [0, 1)."""


PlacementPolicy = Callable[[PlaceRequest, Candidates, Uniform], LoadView]

_AFFINITY_OCCUPANCY = 0.9
"""Share of KV in use beyond which ``prefix`` no longer sends requests after their prefix."""

_AS_SOON = 16
"""Blocks of prompt that make no difference to ``prefix``."""


def freeness(request: PlaceRequest, candidates: Candidates, rng: Uniform) -> LoadView:
    """The least predicted loss of time, by freeness (Llumnix, section 4.4) and prompts.

    A request loses by memory that runs short, by prompts that are computed before it, and
    where it must compute blocks of its prompt that another instance holds.
    """
    lost = candidates.memory_seconds + candidates.prompt_seconds
    longest = np.maximum.reduce(candidates.cached)
    if longest:
        missing = longest - candidates.cached
        lost = lost + missing * candidates.block_prompt_seconds
    return candidates.best(-lost)


def prefix(request: PlaceRequest, candidates: Candidates, rng: Uniform) -> LoadView:
    """The longest prefix held, where no queue costs more than the prefix saves.

    Of the instances that are not nearly full those count where least is to be computed until
    the first token: the prompts before it, and what is missing of its own. What is missing
    counts twice, since it also delays what comes after. Among these the longest prefix
    decides, then freeness.
    """
    spare = candidates.occupancy < _AFFINITY_OCCUPANCY
    if spare.any() and not spare.all():
        candidates = candidates.where(spare)
    if candidates.cached.any():
        block = candidates.block_prompt_seconds
        missing = candidates.cached.max() - candidates.cached
        until = candidates.prompt_seconds + 2.0 * missing * block
        soon = until <= until.min() + _AS_SOON * block
        if not soon.all():
            candidates = candidates.where(soon)
    longest = candidates.cached == candidates.cached.max()
    if not longest.all():
        candidates = candidates.where(longest)
    return candidates.best(candidates.freeness)


def least_loaded(request: PlaceRequest, candidates: Candidates, rng: Uniform) -> LoadView:
    """The smallest share of KV blocks used, promised or waited for."""
    return candidates.best(-candidates.occupancy)


def power_of_two(request: PlaceRequest, candidates: Candidates, rng: Uniform) -> LoadView:
    """The less loaded of two different instances drawn at random."""
    count = len(candidates)
    first = int(rng.random() * count)
    if count == 1:
        return candidates[0]
    second = (first + 1 + int(rng.random() * (count - 1))) % count
    pair = np.zeros(count, np.bool_)
    pair[[first, second]] = True
    return least_loaded(request, candidates.where(pair), rng)


def round_robin(request: PlaceRequest, candidates: Candidates, rng: Uniform) -> LoadView:
    """The instance whose last placement is longest ago."""
    return candidates[int(candidates.last_placed.argmin())]


def random(request: PlaceRequest, candidates: Candidates, rng: Uniform) -> LoadView:
    """Any instance, with equal chances."""
    return candidates[int(rng.random() * len(candidates))]


def llumnix(request: PlaceRequest, candidates: Candidates, rng: Uniform) -> LoadView:
    """Llumnix's dispatch as it was released (v0.1.0): most remaining steps.

    Free blocks less the demand of all that wait, per request that runs or waits, of the
    loads as last reported: what was dispatched since is not seen.
    """

    return max(candidates, key=lambda view: remaining_steps(view, all_waiting=True))


def infaas(request: PlaceRequest, candidates: Candidates, rng: Uniform) -> LoadView:
    """INFaaS++, Llumnix's baseline: least memory used or waited for, as last reported."""

    def usage(view: LoadView) -> float:
        return (view.total - view.reported.free + sum(view.reported.waiting)) / max(1, view.total)

    return min(candidates, key=usage)


@dataclass(frozen=True, slots=True)
class NamedPolicy:
    """A placement policy and what goes with it.

    Attributes:
        choose: The policy.
        late_binding: Requests wait in the dispatcher while no instance has room.
        rebalancing: Rules by which running requests move: "gain" (the project's),
            "llumnix", or "off". Draining moves them in any case.
    """

    choose: PlacementPolicy
    late_binding: bool = True
    rebalancing: str = "gain"


POLICIES: dict[str, NamedPolicy] = {
    "freeness": NamedPolicy(freeness),
    "prefix": NamedPolicy(prefix),
    "least_loaded": NamedPolicy(least_loaded),
    "power_of_two": NamedPolicy(power_of_two),
    "round_robin": NamedPolicy(round_robin),
    "random": NamedPolicy(random),
    "llumnix": NamedPolicy(llumnix, late_binding=False, rebalancing="llumnix"),
    "infaas": NamedPolicy(infaas, late_binding=False, rebalancing="off"),
}
