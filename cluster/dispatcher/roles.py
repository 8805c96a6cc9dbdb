"""Which instances compute prompts and which what follows, as the mix of requests changes.

With fixed roles the split must fit the lengths that clients send: DistServe (OSDI '24) searches
it ahead for a known workload, and plans anew where that drifts. Here the split follows the load.
For each number of prompt instances two times are predicted, as shares of what is wanted: that to
the first token, from what was placed lately (a queue of one server by Pollaczek and Khinchine) and
what has piled up, and that per output token, from the batch that the others would share. One
instance at a time changes its role towards the split whose worse share is least.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cluster.dispatcher.predicted import STEP_SECONDS
from cluster.dispatcher.views import InstanceState, LoadView
from instance.budget import StepCosts
from instance.load import Role

_PROMPT_TOKEN_SECONDS = 0.0002
"""What a prompt token costs where nothing was measured."""
_FULL = 0.9
"""Share of their memory that instances which decode should use at most."""
_LATE = 0.1
"""Share of requests that may wait longer than predicted."""
_BUSIEST = 0.98
"""Share of its time beyond which an instance's queue is taken to grow for good."""


@dataclass(frozen=True, slots=True)
class RolesConfig:
    """When instances change between prompts and what follows.

    Attributes:
        enabled: Whether they do at all. Instances that do both are left as they are.
        ttft: Seconds to the first token that are wanted.
        tpot: Seconds per output token that are wanted.
        window: Seconds of requests from which the load of prompts is taken.
        cooldown: Seconds between two changes.
        margin: Share by which the worse of the two times must fall for a change.
    """

    enabled: bool = False
    ttft: float = 2.0
    tpot: float = 0.1
    window: float = 30.0
    cooldown: float = 5.0
    margin: float = 0.15

    def __post_init__(self) -> None:
        if min(self.ttft, self.tpot, self.window) <= 0:
            raise ValueError("times wanted, and the window, must be above 0")


@dataclass(frozen=True, slots=True)
class Demand:
    """What instances with a role are asked for, together.

    Attributes:
        rate: Prompts per second.
        mean: Seconds of an instance that a prompt takes, on average.
        square: Mean of the squares of these.
        backlog: Seconds of an instance that the prompts not computed yet take.
        rows: Sequences that decode or will next.
        context: KV tokens that these hold.
        tokens: KV tokens that an instance holds.
    """

    rate: float
    mean: float
    square: float
    backlog: float
    rows: int
    context: int
    tokens: int


def first_token_seconds(demand: Demand, count: int, window: float) -> float:
    """Time to the first token of all but few prompts, with ``count`` instances for them.

    Of a request that waits at all the wait is taken to be exponential. What is asked for
    beyond the instances' time piles up over another window.
    """
    busy = demand.rate * demand.mean / count
    beyond = max(0.0, busy - _BUSIEST)
    queue = 0.0
    if busy > _LATE:
        spare = 1.0 - min(busy, _BUSIEST)
        queue = demand.square / (2.0 * demand.mean * spare) * math.log(busy / _LATE)
    return demand.mean + max(queue, demand.backlog / count) + beyond * window


def output_token_seconds(demand: Demand, count: int, costs: StepCosts | None) -> float:
    """Expected duration of a decode step, with ``count`` instances for what follows prompts."""
    if costs is None:
        return STEP_SECONDS
    return costs.base + (costs.decode * demand.rows + costs.decode_context * demand.context) / count


def worse_share(
    demand: Demand, prompts: int, others: int, costs: StepCosts | None, config: RolesConfig
) -> float:
    """The worse of the two times, over what is wanted; memory that runs out counts as time."""
    first = first_token_seconds(demand, prompts, config.window) / config.ttft
    step = output_token_seconds(demand, others, costs) / config.tpot
    memory = demand.context / (others * max(1, demand.tokens)) / _FULL
    return max(first, step * max(1.0, memory))


class Roles:
    """Follows the load, and says who changes.

    Args:
        config: When to change.
        count: Counts an event of a kind under a reason.

    Attributes:
        config: As given.
    """

    def __init__(self, config: RolesConfig, count: Callable[[str, str, int], None]) -> None:
        self.config = config
        self._count = count
        self._placed: deque[tuple[float, int]] = deque()
        self._since: float | None = None
        self._now = 0.0
        self._changed = -math.inf

    def placed(self, tokens: int) -> None:
        """A request was placed, of whose prompt so many tokens must be computed there."""
        if self.config.enabled and self._since is not None:
            self._placed.append((self._now, tokens))

    def update(
        self,
        views: Sequence[LoadView],
        held: int,
        pinned: Callable[[str], bool],
        now: float,
    ) -> tuple[str, Role] | None:
        """Look at the cluster, now and then; placements count from the first time on.

        Args:
            views: Instances that are not gone.
            held: Tokens of prompts that wait for an instance with room.
            pinned: Whether an operator gave an instance its role, which it keeps.
            now: The time.

        Returns:
            The instance that shall change and what it shall be; None for no change.
        """
        config = self.config
        if not config.enabled:
            return None
        self._now = now
        if self._since is None:
            self._since = now
        while self._placed and self._placed[0][0] < now - config.window:
            self._placed.popleft()
        if now - max(self._since, self._changed) < config.cooldown:
            return None
        ready = [view for view in views if view.state is InstanceState.READY]
        prompts = [view for view in ready if view.role is Role.PREFILL]
        others = [view for view in ready if view.role is Role.DECODE]
        number = len(prompts) + len(others)
        if not prompts or not others or number < 3:
            return None
        costs = next((view.costs for view in (*others, *prompts) if view.costs), None)
        demand = self._demand([*prompts, *others], held, costs, now)
        shares = {
            count: worse_share(demand, count, number - count, costs, config)
            for count in range(1, number)
        }
        present = len(prompts)
        best = min(shares, key=lambda count: (shares[count], abs(count - present)))
        if best == present or shares[best] > (1.0 - config.margin) * shares[present]:
            return None
        role, among = (Role.PREFILL, others) if best > present else (Role.DECODE, prompts)
        free = [view for view in among if not pinned(view.instance_id)]
        if not free:
            return None
        self._changed = now
        self._count("roles", f"to_{role}", 1)
        # An instance ends the prompts that it has begun, and hands on what decodes.
        least = min(free, key=lambda view: (view.backlog, view.occupancy, view.instance_id))
        return least.instance_id, role

    def _demand(
        self, views: Sequence[LoadView], held: int, costs: StepCosts | None, now: float
    ) -> Demand:
        token = costs.prefill if costs is not None and costs.prefill else _PROMPT_TOKEN_SECONDS
        seconds = [tokens * token for _, tokens in self._placed]
        since = now if self._since is None else self._since
        span = max(min(self.config.window, now - since), self.config.window / 10)
        number = max(1, len(seconds))
        size = views[0].info.model.block_size
        return Demand(
            rate=len(seconds) / span,
            mean=sum(seconds) / number,
            square=sum(one * one for one in seconds) / number,
            backlog=(held + sum(view.backlog for view in views)) * token,
            rows=sum(view.num_requests for view in views),
            context=sum(view.total - view.free for view in views) * size,
            tokens=sum(view.total for view in views) // len(views) * size,
        )
