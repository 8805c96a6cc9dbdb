"""Migrations of the cluster: started on demand or by plan, followed until they end."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

from cluster.dispatcher.events import Action, RejectMigration, StartMigration
from cluster.dispatcher.load import InstanceLoad, InstanceState, Transfer
from cluster.dispatcher.members import Members
from cluster.dispatcher.rebalance import (
    Cooldowns,
    Move,
    RebalanceConfig,
    best_destination,
    plan_balance,
    plan_drain,
)
from instance.load import MigrationReport, SequenceLoad

MOVED = "moved"


class Migrations:
    """Starts migrations and keeps account of them.

    Args:
        members: Instances and loads; its ``transfers`` are the migrations under way.
        config: When to move requests.
        timeout: Seconds after which a migration that nobody ended is forgotten.
        count: Counts an event of a kind under a reason.
        is_over: Whether a sequence has ended or is void.
    """

    def __init__(
        self,
        members: Members,
        config: RebalanceConfig,
        timeout: float,
        count: Callable[[str, str, int], None],
        is_over: Callable[[SequenceLoad], bool],
    ) -> None:
        self.config = config
        self._members = members
        self._timeout = timeout
        self._count = count
        self._is_over = is_over
        self._cooldowns = Cooldowns()
        self._balanced = -math.inf

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
        for instance_id in (transfer.source, transfer.destination):
            if instance_id in members.loads:
                members.loads[instance_id].settled = now
        if report.outcome != MOVED:
            return
        # The home advances the epoch by one when it grants the destination's claim.
        moved = dataclasses.replace(transfer.sequence, epoch=transfer.sequence.epoch + 1)
        members.release(moved.request_id, moved.epoch)
        destination = members.loads.get(transfer.destination)
        if destination is not None and not self._is_over(moved):
            destination.charge(moved, now)

    def tick(self, now: float) -> list[Action]:
        """Forget what nobody ended, then plan the moves that are due."""
        members, config = self._members, self.config
        for request_id, transfer in list(members.transfers.items()):
            if now - transfer.since > self._timeout:
                members.end(request_id)
                self._count("migrations_ended", f"{transfer.reason}/forgotten", 1)
        self._cooldowns.prune(now, config)
        budget = config.max_in_flight - len(members.transfers)
        due = config.enabled and now - self._balanced >= config.interval
        views = members.views(now)
        draining = any(view.state is InstanceState.DRAINING for view in views)
        if budget <= 0 or not (due or draining):
            return []
        sequences = {view.instance_id: members.staying(view.instance_id) for view in views}
        barred = {s.request_id for found in sequences.values() for s in found if self._is_over(s)}
        moves = plan_drain(views, sequences, barred, self._cooldowns, now, budget, config)
        if due and not moves:
            self._balanced = now
            settled = [view for view in views if members.settled(view.instance_id)]
            moves = plan_balance(settled, sequences, barred, self._cooldowns, now, budget, config)
        return [self._start(move, now) for move in moves]

    def _start(self, move: Move, now: float) -> StartMigration:
        request_id = move.sequence.request_id
        self._members.begin(
            Transfer(move.sequence, move.source, move.destination, move.reason, now)
        )
        self._cooldowns.note(move, now)
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
