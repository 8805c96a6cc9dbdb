"""One instance's load at one instant: what policies decide by."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import NamedTuple

from instance.budget import StepCosts
from instance.load import InstanceInfo, Role


class InstanceState(StrEnum):
    """What the dispatcher may ask of an instance.

    READY: takes requests.
    SUSPECT: its reports are late; takes requests only where no ready instance is left.
    DRAINING: takes none, and its requests move away.
    GONE: its reports ended long ago, or it left; it may come back.
    """

    READY = "ready"
    SUSPECT = "suspect"
    DRAINING = "draining"
    GONE = "gone"


class Reported(NamedTuple):
    """What the last report says by itself, without charges and migrations under way.

    Attributes:
        free: KV blocks free or cached.
        running: Sequences in the batch.
        waiting: KV blocks wanted by each waiting sequence, in queue order.
        preempted: Waiting sequences that were in the batch before.
    """

    free: int
    running: int
    waiting: tuple[int, ...]
    preempted: int


_NO_REPORT = Reported(0, 0, (), 0)


class LoadView(NamedTuple):
    """One instance's load at one instant: what policies decide by.

    Attributes:
        free: KV blocks free or cached, less those promised to charges and transfers.
        reserve: KV blocks kept free for the interactive class where a request of it runs.
        running: Sequences in the batch, and those charged or on their way, which will be.
        interactive: Of these, those of the interactive class.
        interactive_blocks: KV blocks of those.
        waiting: KV blocks wanted by each waiting sequence, in queue order.
        charged: Of ``running``, those sent here that no report holds yet.
        backlog: Prompt tokens that are here, or on their way, and not computed yet.
        step_seconds: Measured median step; 0 before the first.
        costs: What its steps cost, as it learned; None if unknown.
        last_placed: Number of the last placement made here; 0 before the first.
        reported: The last report by itself.
    """

    info: InstanceInfo
    state: InstanceState
    total: int
    free: int
    reserve: int
    running: int
    waiting: tuple[int, ...]
    step_seconds: float
    interactive: int = 0
    interactive_blocks: int = 0
    last_placed: int = 0
    role: Role = Role.MIXED
    charged: int = 0
    backlog: int = 0
    costs: StepCosts | None = None
    reported: Reported = _NO_REPORT

    @property
    def instance_id(self) -> str:
        return self.info.instance_id

    @property
    def headroom(self) -> int:
        """KV blocks that interactive requests use beside their own: so many in all, divided
        among those that are here (Llumnix, algorithm 1), and none where there are none."""
        return self.reserve if self.interactive else 0

    @property
    def shared_room(self) -> int:
        """KV blocks that interactive requests may yet take together where some run: with so
        many more they leave the headroom free, whatever others use for now; 0 where none runs."""
        return self.total - self.reserve - self.interactive_blocks if self.headroom else 0

    @property
    def num_requests(self) -> int:
        """Sequences running, promised and waiting."""
        return self.running + len(self.waiting)

    @property
    def occupancy(self) -> float:
        """Share of KV blocks used, promised or waited for; may exceed 1."""
        return (self.total - self.free + sum(self.waiting)) / max(1, self.total)

    def placement_freeness(self) -> float:
        """Freeness that a new request meets: every waiting sequence counts with its demand."""
        return self._freeness(self.free - sum(self.waiting), self.num_requests)

    def rebalancing_freeness(self) -> float:
        """Freeness by which instances are paired: of the waiting, only the first counts."""
        demand = self.waiting[0] if self.waiting else 0
        return self._freeness(self.free - demand, self.running + bool(self.waiting))

    def _freeness(self, free: int, batch: int) -> float:
        """(M - sum of virtual usage) / batch, as Llumnix (section 4.4.1) defines it.

        A draining instance holds an infinite request. Where demand exceeds memory the
        shortage is not divided: else the fuller of two overloaded instances would look
        the freer one, and adding a request would raise freeness.
        """
        if self.state in (InstanceState.DRAINING, InstanceState.GONE):
            return -math.inf
        slack = free - self.headroom
        return slack / max(1, batch) if slack > 0 else float(slack)
