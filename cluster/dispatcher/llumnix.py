"""Llumnix's rules for migration as it was released (v0.1.0), to compare against.

Load is what an instance reported last: remaining steps are the free blocks, less a reserve
and what the first waiting request demands, per request that runs or is that first one. An
instance with fewer than a threshold, or with preempted requests, is a source; one with more,
and none preempted, a destination. The fullest is paired with the emptiest, the next with the
next, whatever it brings, and of each source the shortest running request of the lowest
class moves. One migration at a time per instance. The placement that goes with it is
``placement.llumnix``.
"""

from __future__ import annotations

import math

from cluster.dispatcher.rebalance import Move, Round, compatible
from cluster.dispatcher.views import InstanceState, LoadView

WATERMARK = 0.01
"""Share of an instance's blocks that is kept in reserve (vLLM's default at the time)."""


def remaining_steps(view: LoadView, all_waiting: bool) -> float:
    """Blocks left per request, as last reported; infinite for an empty instance.

    Args:
        view: The instance.
        all_waiting: Count every waiting request, as for dispatch; else only the first.
    """
    free, running, waiting, _ = view.reported
    counted = waiting if all_waiting else waiting[:1]
    requests = running + len(counted)
    available = free - int(WATERMARK * view.total) - sum(counted)
    return available / requests if requests else math.inf


def plan_llumnix(plan: Round) -> None:
    """Pair sources with destinations."""
    loads = {
        name: remaining_steps(view, all_waiting=False)
        for name, view in plan.views.items()
        if view.state is InstanceState.READY and plan.slots[name] >= plan.config.max_per_instance
    }
    killed = {name for name in loads if plan.views[name].reported.preempted}
    threshold = plan.config.llumnix_threshold
    sources = [name for name in loads if name in killed or loads[name] < threshold]
    takers = [name for name in loads if name not in killed and loads[name] > threshold]
    sources.sort(key=lambda name: (loads[name], name))
    takers.sort(key=lambda name: (-loads[name], name))
    for source, taker in zip(sources, takers, strict=False):
        if plan.budget <= 0 or not compatible(plan.views[source], plan.views[taker]):
            break
        movable = [s for s in plan.sequences[source] if s.running and plan.may_move(s, 0.0)]
        if movable:
            chosen = min(movable, key=lambda s: (-s.request_class, s.num_tokens, s.request_id))
            plan.add(Move(chosen, source, taker, "balance"))
