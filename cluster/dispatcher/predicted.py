"""Load in predicted time: what requests on an instance are expected to lose there.

Placement and rebalancing weigh different things: memory that runs short, prompts that are
computed first, KV that must be sent. All are counted here in seconds that requests lose.

Memory: as long as nothing ends, the requests of an instance fill their share of its free KV
in freeness times the duration of a block. The shorter that time, the likelier one of them is
preempted while the others live; the loss is taken to be in proportion to its inverse.
Steps: rows of others, and the KV that these read, make every step longer.
Prompts: those that are there already are computed first.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cluster.dispatcher.views import LoadView
from instance.budget import StepCosts

STEP_SECONDS = 0.02
"""Duration of a decode step where none was measured."""
EXPOSURE = 10.0
"""Seconds lost by a preemption times those for which a request is exposed to it."""
NEAR = 1.0
"""Seconds from which on a shortage of memory is as good as there."""
RELEASE = 20.0
"""Seconds in which an instance gives back as much KV as it has."""

STEPS_AHEAD = 128
"""Steps for which a batch is taken to stay as it is."""

Number = TypeVar("Number", float, NDArray[np.float64])


def block_seconds(view: LoadView) -> float:
    """Seconds in which a decoding sequence fills one KV block."""
    return view.info.model.block_size * (view.step_seconds or STEP_SECONDS)


def memory_seconds(freeness: Number, seconds: float | Number, total: float | Number) -> Number:
    """Seconds that each request of an instance is expected to lose by want of memory.

    Args:
        freeness: Free KV blocks per request, or, where demand exceeds memory, the blocks
            that are short, below 0; of one instance or more.
        seconds: In which a decoding sequence fills a block.
        total: KV blocks of the instance.

    Returns:
        Falls as freeness rises, everywhere.
    """
    lost: Number
    least = freeness if isinstance(freeness, float) else np.minimum.reduce(freeness)
    if least >= 0.0:  # as nearly always: nothing is short
        lost = EXPOSURE / (NEAR + freeness * seconds)
        return lost
    left = np.maximum(freeness * seconds, 0.0)
    short = np.maximum(-freeness, 0.0)
    lost = EXPOSURE / (NEAR + left) + RELEASE * short / np.maximum(total, 1)
    return lost


def prompt_seconds(view: LoadView) -> float:
    """Seconds until the prompts that are on an instance, or on their way, are computed."""
    return view.backlog * view.costs.prefill if view.costs is not None else 0.0


def lost_seconds(view: LoadView, costs: StepCosts | None) -> float:
    """Seconds that all requests of an instance together are expected to lose by sharing it.

    By want of memory, and by the time that others' rows and KV add to the next steps. Of those
    that wait the first counts, as in the freeness by which instances are paired.

    Args:
        costs: Of steps. Equal instances learn different ones: of a pair both are judged by
            the same, so that no request moves for what is noise.
    """
    requests = view.running + bool(view.waiting)
    lost = memory_seconds(view.rebalancing_freeness(), block_seconds(view), view.total)
    if costs is not None:
        context = (view.total - view.free) * view.info.model.block_size
        step = costs.decode * view.running + costs.decode_context * context
        lost += STEPS_AHEAD * step
    return requests * float(lost)
