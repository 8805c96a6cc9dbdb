"""Migrations of the cluster: started on demand or by plan, followed until they end."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator

from cluster.dispatcher.duties import plan_drain, plan_handoff
from cluster.dispatcher.evening import Order, plan_fairness
from cluster.dispatcher.events import Action, RejectMigration, StartMigration
from cluster.dispatcher.gains import plan_balance, plan_defragment, plan_isolate
from cluster.dispatcher.gathering import Line, plan_gathering
from cluster.dispatcher.links import LinkRates
from cluster.dispatcher.llumnix import plan_llumnix
from cluster.dispatcher.load import InstanceLoad, Transfer
from cluster.dispatcher.members import Members
from cluster.dispatcher.rebalance import (
    Cooldowns,
    Move,
    RebalanceConfig,
    Round,
    best_destination,
)
from cluster.dispatcher.views import InstanceState, LoadView
from instance.load import MigrationReport, Role, SequenceLoad

MOVED = "moved"
_PER_INSTANCE = 0.001
"""Seconds by which rounds for fairness are further apart with each instance."""


class Migrations:
    """Starts migrations and keeps account of them.

    Args:
        members: Instances and loads; its ``transfers`` are the migrations under way.
        config: When to move requests.
        timeout: Seconds after which a migration that nobody ended is forgotten.
        count: Counts an event of a kind under a reason.
        is_over: Whether a sequence has ended or is void.
        order: How far tenants are behind.
        line: What waits in the dispatcher.

    Attributes:
        config: As given; may be replaced.
        rules: By which requests move: "gain", "llumnix" or "off"; drains and handoffs go on.
        links: How fast KV moves.
    """

    def __init__(
        self,
        members: Members,
        config: RebalanceConfig,
        timeout: float,
        count: Callable[[str, str, int], None],
        is_over: Callable[[SequenceLoad], bool],
        order: Order,
        line: Line,
    ) -> None:
        self.config = config
        self.rules = "gain"
        self._order = order
        self._line = line
        self.links = LinkRates()
        self._members = members
        self._timeout = timeout
        self._count = count
        self._is_over = is_over
        self._cooldowns = Cooldowns()
        self._balanced = -math.inf
        self._evened = -math.inf
        self._waited: dict[str, float] = {}

    def requested(self, request_id: str, destination: str | None, now: float) -> list[Action]:
        """An operator wants a request moved; ``destination`` None leaves the choice open."""

        def reject(code: str, message: str) -> list[Action]:
            return [RejectMigration(request_id, code, message)]

        members = self._members
        found = self.locate(request_id, now)
        if found is None:
            return reject("unknown_request", "no instance holds this request")
        source, sequence = found
        if request_id in members.transfers or sequence.migrating:
            return reject("conflict", "the request is migrating already")
        if destination is None:
            view = members.view(source, now)
            target = best_destination(view, members.views(now), sequence)
            if target is None:
                return reject("conflict", "no other instance has room for the request")
            destination = target.instance_id
        state = members.state(destination, now)
        if state is InstanceState.GONE:
            return reject("unknown_instance", f"there is no instance {destination!r}")
        if destination == source.info.instance_id:
            return reject("conflict", f"the request is on {destination!r} already")
        if state is InstanceState.DRAINING:
            return reject("conflict", f"{destination!r} is draining")
        return [self._start(Move(sequence, source.info.instance_id, destination, "admin"), now)]

    def ended(self, report: MigrationReport, now: float) -> None:
        """A migration has ended, well or not."""
        # The part before a colon is the named reason; what follows is for people.
        outcome = report.outcome.partition(":")[0]
        self._count("migrations_ended", f"{report.reason}/{outcome}", 1)
        self._count("migrated_bytes", report.reason, report.bytes_copied)
        members = self._members
        transfer = members.end(report.request_id)
        if transfer is None:
            return
        source = members.loads.get(transfer.source)
        destination = members.loads.get(transfer.destination)
        for load in (source, destination):
            if load is not None:
                load.settled = now
        if source is not None and destination is not None:
            self.links.note(source.info, destination.info, report)
        if report.outcome != MOVED:
            return
        # The home advances the epoch by one when it grants the destination's claim.
        moved = transfer.sequence._replace(epoch=transfer.sequence.epoch + 1)
        members.release(moved.request_id, moved.epoch)
        if destination is not None and not self._is_over(moved):
            destination.charge(moved, now)

    def tick(self, now: float) -> list[Action]:
        """Forget what nobody ended, then plan the moves that are due."""
        members, config = self._members, self.config
        for request_id, transfer in list(members.transfers.items()):
            if now - transfer.since > self._timeout:
                members.end(request_id)
                self._count("migrations_ended", f"{transfer.reason}/forgotten", 1)
        rules = self.rules if config.enabled else "off"
        due = rules != "off" and now - self._balanced >= config.interval
        even = due or (rules == "gain" and self._apart(now))
        emptying = [
            name
            for name, load in members.loads.items()
            if load.drains or load.present_role is Role.PREFILL
        ]
        budget = config.max_in_flight - len(members.transfers)
        if budget <= 0 or not (even or emptying):
            return []
        views = {view.instance_id: view for view in members.views(now)}
        emptying = [name for name in emptying if name in views]
        plan = self._round(views, list(views) if even else emptying, budget, now)
        plan_drain(plan, {name for name in emptying if members.loads[name].leaving})
        plan_handoff(plan)
        owed = len(plan.moves)
        if due:
            self._balanced = now
            self._cooldowns.prune(now, config, self._waited_or_running(plan))
            self._plan_gains(plan, rules)
        elif even:
            plan_fairness(plan, self._order)
        if even:
            self._evened = now
        return [self._start(move, now, at >= owed) for at, move in enumerate(plan.moves)]

    def _apart(self, now: float) -> bool:
        """Whether waiting tenants are so far apart that the next round comes early.

        With the number of instances such rounds cost more, and come less often.
        """
        interval = self.config.even_interval + _PER_INSTANCE * len(self._members.loads)
        return now - self._evened >= interval and self._order.apart()

    def _plan_gains(self, plan: Round, rules: str) -> None:
        if rules == "llumnix":
            plan_llumnix(plan)
        elif rules == "gain":
            plan_defragment(plan)
            plan_isolate(plan)
            plan_gathering(plan, self._line, self._order)
            plan_fairness(plan, self._order)
            plan_balance(plan)

    def preview(self, rules: str, now: float) -> list[Move]:
        """The moves for gain that a round by ``rules`` would start now."""
        views = {view.instance_id: view for view in self._members.views(now)}
        budget = self.config.max_in_flight - len(self._members.transfers)
        plan = self._round(views, list(views), budget, now)
        self._plan_gains(plan, rules)
        return plan.moves

    def _round(
        self, views: dict[str, LoadView], listed: list[str], budget: int, now: float
    ) -> Round:
        members, config = self._members, self.config
        slots = Counter(dict.fromkeys(views, config.max_per_instance))
        for transfer in members.transfers.values():
            slots.subtract((transfer.source, transfer.destination))
        sequences = {name: members.staying(name) for name in listed}
        if len(listed) == len(views):
            waiting = {s.request_id for found in sequences.values() for s in found if not s.running}
            self._waited = {key: self._waited.get(key, now) for key in waiting}
        return Round(
            views=views,
            sequences=sequences,
            settled={name for name in views if members.settled(name)},
            barred=self._is_over,
            waited=self._waited,
            cooldowns=self._cooldowns,
            links=self.links,
            config=config,
            now=now,
            slots=slots,
            budget=budget,
            expected={name: members.expected(name) for name in listed},
        )

    def _waited_or_running(self, plan: Round) -> Callable[[str], bool]:
        present = {s.request_id for found in plan.sequences.values() for s in found}
        return lambda request_id: request_id in present or request_id in self._members.transfers

    def _start(self, move: Move, now: float, for_gain: bool = False) -> StartMigration:
        request_id = move.sequence.request_id
        self._members.begin(
            Transfer(move.sequence, move.source, move.destination, move.reason, now)
        )
        self._cooldowns.note(move, now, for_gain)
        self._count("migrations_started", move.reason, 1)
        destination = self._members.loads[move.destination].info
        return StartMigration(request_id, move.source, destination, move.reason)

    # ---- what is known

    def locate(self, request_id: str, now: float) -> tuple[InstanceLoad, SequenceLoad] | None:
        """The instance that holds a request under its newest epoch, and what is known of it."""
        found = (item for item in self.requests(now) if item[1].request_id == request_id)
        return max(found, key=lambda item: item[1].epoch, default=None)

    def requests(self, now: float) -> Iterator[tuple[InstanceLoad, SequenceLoad]]:
        """Every request and where it is: reported ones, then those charged only."""
        return (item for item in self._members.requests(now) if not self._is_over(item[1]))
