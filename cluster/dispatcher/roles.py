"""Which instances compute prompts and which what follows, as the mix of requests changes.

With fixed roles the split must fit the lengths that clients send: DistServe (OSDI '24) searches
it ahead for a known workload, and plans anew where that drifts. Here the split follows the load.
For each number of prompt instances two times are predicted, as shares of what is wanted: that to
the first token, from what was placed lately (a queue of one server by Pollaczek and Khinchine) and
what stays piled up, and that per output token, from the batch that the others would share. While
both are well within what is wanted nothing changes: a change costs moves, and rates that are
counted over a short time are uncertain. Else one instance at a time changes its role towards the
split whose worse share is least.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace

from cluster.dispatcher.predicted import STEP_SECONDS
from cluster.dispatcher.views import InstanceState, LoadView
from instance.budget import StepCosts
from instance.load import Role

_UNMEASURED = StepCosts(base=STEP_SECONDS, prefill=0.0002)
"""What steps cost where nothing was measured."""
_FULL = 0.9
"""Share of their memory that instances should use at most."""
_LATE = 0.1
"""Share of requests that may wait longer than predicted."""
_WELL = 0.75
"""Share of the times wanted up to which nothing changes."""
_SETTLED = 0.5
"""Share of the window that must be seen before the first change."""
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
        long: Seconds that all but few prompts take at most.
        backlog: Seconds of an instance that prompts take which stay piled up.
        step: Seconds of a decode step without any rows.
        rows: Seconds that the rows of all sequences that decode would add to one step.
        context: KV tokens that these hold.
        tokens: KV tokens that an instance holds.
    """

    rate: float
    mean: float
    square: float
    long: float
    backlog: float
    step: float
    rows: float
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
    return demand.long + max(queue, demand.backlog / count) + beyond * window


def output_token_seconds(demand: Demand, count: int) -> float:
    """Expected duration of a decode step, with ``count`` instances for what follows prompts."""
    return demand.step + _kept(demand, count) * demand.rows / count


def _kept(demand: Demand, count: int) -> float:
    """The share of what decodes for which ``count`` instances have memory."""
    return min(1.0, count * demand.tokens / max(1, demand.context))


def worse_share(demand: Demand, prompts: int, others: int, config: RolesConfig) -> float:
    """The worse of the two times, over what is wanted.

    What the others have no memory for is decoded where its prompt was computed. There a step
    takes what is wanted while prompts share it, since instances bound it so, and else what it
    takes elsewhere. Memory that is short in all of them counts as time.
    """
    first = first_token_seconds(demand, prompts, config.window) / config.ttft
    step = output_token_seconds(demand, others) / config.tpot
    if _kept(demand, others) < 1.0:
        busy = min(1.0, demand.rate * demand.mean / prompts)
        step = max(step, busy + (1.0 - busy) * step)
    memory = demand.context / ((prompts + others) * max(1, demand.tokens)) / _FULL
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
        self._backlogs: deque[tuple[float, int]] = deque()
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
        self._backlogs.append((now, held + sum(view.backlog for view in views)))
        while self._backlogs[0][0] < now - config.cooldown:
            self._backlogs.popleft()
        settled = now - self._since >= max(config.cooldown, _SETTLED * config.window)
        if not settled or now - self._changed < config.cooldown:
            return None
        ready = [view for view in views if view.state is InstanceState.READY]
        prompts = [view for view in ready if view.role is Role.PREFILL]
        others = [view for view in ready if view.role is Role.DECODE]
        number = len(prompts) + len(others)
        if not prompts or not others or number < 3:
            return None
        demand = self._demand(prompts, others, now)
        shares = {
            count: worse_share(demand, count, number - count, config) for count in range(1, number)
        }
        present = len(prompts)
        if shares[present] <= _WELL:
            return None
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
        self, prompts: Sequence[LoadView], others: Sequence[LoadView], now: float
    ) -> Demand:
        tokens = [tokens for _, tokens in self._placed]
        number = max(1, len(tokens))
        per_prompt = max(1.0, sum(tokens) / number)
        # Each instance learns what its own steps hold, and some hold little that tells.
        costs = _mean_costs(prompts) or _mean_costs(others) or _UNMEASURED
        seconds = sorted(costs.base + costs.prefill_seconds(0, one) for one in tokens)
        mean = sum(seconds) / number
        since = now if self._since is None else self._since
        span = max(min(self.config.window, now - since), self.config.window / 10)
        standing = min(waiting for _, waiting in self._backlogs)
        # On instances for prompts those decode which could not go on, or are about to.
        there = sum(view.num_requests for view in prompts)
        reading = math.ceil(sum(view.backlog for view in prompts) / per_prompt)
        share = max(0, there - reading) / max(1, there)
        size = others[0].info.model.block_size
        used = [sum(view.total - view.free for view in views) for views in (prompts, others)]
        context = round(used[1] + share * used[0]) * size
        measured = [view.step_seconds for view in others if view.step_seconds > 0.0]
        step = sum(measured) / len(measured) if measured else STEP_SECONDS
        base = min(step, (_mean_costs([*prompts, *others]) or _UNMEASURED).base)
        demand = Demand(
            rate=len(seconds) / span,
            mean=mean,
            square=sum(one * one for one in seconds) / number,
            long=seconds[int((1.0 - _LATE) * (number - 1))] if seconds else 0.0,
            backlog=standing * (mean / per_prompt if tokens else costs.prefill),
            step=base,
            rows=(step - base) * len(others),
            context=context,
            tokens=sum(view.total for view in others) // len(others) * size,
        )
        # What was measured is of the rows for which there was memory.
        return replace(demand, rows=demand.rows / max(_kept(demand, len(others)), 1e-3))


def _mean_costs(views: Sequence[LoadView]) -> StepCosts | None:
    """What steps cost on instances, on average over those that know."""
    known = [astuple(view.costs) for view in views if view.costs is not None]
    if not known:
        return None
    return StepCosts(*(math.fsum(of) / len(known) for of in zip(*known, strict=True)))
