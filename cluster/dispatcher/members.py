"""The instances that the dispatcher knows, and the migrations between them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from cluster.dispatcher.candidates import Candidates, find_candidates
from cluster.dispatcher.load import Book, InstanceLoad, LoadConfig, Transfer
from cluster.dispatcher.messages import ClusterView, InstanceView, PlaceRequest
from cluster.dispatcher.prefix_index import PrefixIndex
from cluster.dispatcher.table import LoadTable
from cluster.dispatcher.views import InstanceState, LoadView
from instance.load import InstanceInfo, LoadReport, Role, SequenceLoad
from instance.request import Account

_ASK_INTERVAL = 2.0
"""Seconds before an instance is asked again for its prefixes."""


class Members:
    """Membership, loads and views.

    Args:
        config: How long reports are trusted.
        version: First version of the membership.
        prefix_capacity: Pairs of prefix key and instance remembered at most.

    Attributes:
        loads: By instance id; those gone are kept for a while, since they may come back.
        transfers: Migrations under way, by request id; change them by ``begin`` and ``end``.
        prefixes: Which instance holds which prefixes.
        version: Changes whenever membership or an instance's state does.
    """

    def __init__(self, config: LoadConfig, version: int, prefix_capacity: int = 1 << 19) -> None:
        self.loads: dict[str, InstanceLoad] = {}
        self.transfers: dict[str, Transfer] = {}
        self.version = version
        self._config = config
        self._book = Book()
        self.table = LoadTable(config, self._book)
        self.prefixes = PrefixIndex(prefix_capacity)
        self._untold: dict[str, float] = {}
        self._states = self.table.states(0.0)
        self._renewed = False

    def join(self, info: InstanceInfo, now: float) -> str:
        """Take an instance in; returns "joined", "restarted" or "known"."""
        load = self.loads.get(info.instance_id)
        if load is not None and load.info.incarnation == info.incarnation:
            load.info = info
            load.heard = now
            load.left = False
            load.touch()
            return "known"
        fresh = InstanceLoad(info, now, self._book)
        if load is not None:
            load.forget()
            for transfer in list(self.transfers.values()):
                if info.instance_id in (transfer.source, transfer.destination):
                    self.end(transfer.sequence.request_id)
            fresh.draining, fresh.leaving, fresh.role = load.draining, load.leaving, load.role
        self.loads[info.instance_id] = fresh
        self.prefixes.drop(self.table.put(info.instance_id, fresh))
        self._renewed = True
        return "joined" if load is None else "restarted"

    def leave(self, instance_id: str, incarnation: str) -> bool:
        """An instance stops; false if it is not known."""
        if not self.knows(instance_id, incarnation):
            return False
        load = self.loads[instance_id]
        load.left = True
        load.clear()
        load.touch()
        return True

    def knows(self, instance_id: str, incarnation: str) -> bool:
        """Whether reports of this incarnation are understood; if not, it must join again."""
        load = self.loads.get(instance_id)
        return load is not None and load.info.incarnation == incarnation

    def report(self, report: LoadReport, now: float) -> str:
        """Take a report; returns "accepted", "stale" or "unknown"."""
        if not self.knows(report.instance_id, report.incarnation):
            return "unknown"
        if not self.loads[report.instance_id].accept(report, now):
            return "stale"
        if report.prefix is not None:
            row = self.table.rows[report.instance_id]
            if self.prefixes.apply(row, report.prefix):
                self._untold.pop(report.instance_id, None)
            else:
                self._untold.setdefault(report.instance_id, -math.inf)
        return "accepted"

    def ask_prefixes(self, now: float) -> list[str]:
        """Instances that shall tell all their prefixes, since a report of theirs was lost.

        Each is named again only after a while, if it has not told them by then.
        """
        due = [name for name, at in self._untold.items() if now - at > _ASK_INTERVAL]
        self._untold.update(dict.fromkeys(due, now))
        return due

    def state(self, instance_id: str, now: float) -> InstanceState:
        """The state of an instance; GONE if it is not known."""
        load = self.loads.get(instance_id)
        return InstanceState.GONE if load is None else load.state(now, self._config)

    def expire(self, now: float) -> int:
        """Forget old charges and instances long gone; returns the charges forgotten."""
        oldest = now - self._config.charge_lifetime
        expired = sum(load.expire(oldest) for load in self.loads.values() if load.charges)
        for load in self.gone(now):
            load.clear()
            if now - load.heard > self._config.forget_after:
                name = load.info.instance_id
                load.forget()
                del self.loads[name]
                self.prefixes.drop(self.table.remove(name))
                self._untold.pop(name, None)
        return expired

    def gone(self, now: float) -> list[InstanceLoad]:
        """The instances that are gone and not forgotten."""
        return self.table.gone(now)

    def release(self, request_id: str, epoch: int) -> None:
        """Forget the charges of a request up to ``epoch``."""
        for load in list(self._book.charged.get(request_id, ())):
            load.release(request_id, epoch)

    def finished(self, request_id: str, epoch: int) -> None:
        """A request is over at its home."""
        self.release(request_id, epoch)
        load = self._book.reported.get(request_id)
        if load is not None:
            load.ended(request_id, epoch)

    def begin(self, transfer: Transfer) -> None:
        """A migration was started."""
        self.transfers[transfer.sequence.request_id] = transfer
        self._mark(transfer, True)

    def end(self, request_id: str) -> Transfer | None:
        """A migration is over; None if it was not under way."""
        transfer = self.transfers.pop(request_id, None)
        if transfer is not None:
            self._mark(transfer, False)
        return transfer

    def _mark(self, transfer: Transfer, on: bool) -> None:
        if transfer.destination in self.loads:
            self.loads[transfer.destination].arrives(transfer.sequence, on)
        if transfer.source in self.loads:
            self.loads[transfer.source].goes(transfer.sequence, on)

    def set_draining(self, instance_id: str, on: bool | None) -> None:
        """An operator wants an instance emptied, or no longer; None leaves it to its reports."""
        self.loads[instance_id].draining = on
        self.loads[instance_id].touch()

    def set_leaving(self, instance_id: str, on: bool) -> None:
        """The cluster wants to do without an instance, or keeps it after all."""
        self.loads[instance_id].leaving = on
        self.loads[instance_id].touch()

    def set_role(self, instance_id: str, role: Role) -> None:
        """An operator changes what an instance is for."""
        self.loads[instance_id].role = role
        self.loads[instance_id].touch()

    def placed(self, instance_id: str, turn: int) -> None:
        """The placement with this number was made on an instance."""
        self.loads[instance_id].last_placed = turn
        self.loads[instance_id].touch()

    def candidates(
        self, request: PlaceRequest, now: float, since: float | None = None
    ) -> Candidates | None:
        """The instances that may take a request; see ``find_candidates``."""
        found = find_candidates(self.table, request, now, since)
        if found is not None and request.prefix:
            found.cached = self.prefixes.match(request.prefix, self.table.size)[found.rows]
        return found

    def settled(self, instance_id: str) -> bool:
        """Whether its report is younger than its last migration and none is under way."""
        load = self.loads[instance_id]
        return load.report is not None and load.heard > load.settled and not load.moving

    def expected(self, instance_id: str) -> frozenset[Account]:
        """Whose requests were sent to an instance, or move there, and are not reported yet."""
        return self.loads[instance_id].expected

    def staying(self, instance_id: str) -> list[SequenceLoad]:
        """Reported sequences that are not on their way elsewhere, in queue order."""
        return [
            sequence
            for sequence in self.loads[instance_id].sequences
            if sequence.request_id not in self.transfers
            and self.loads[instance_id].counts(sequence.request_id)
        ]

    def view(self, load: InstanceLoad, now: float) -> LoadView:
        """The load of one instance, transfers under way included."""
        return load.view(now, self._config)

    def views(self, now: float) -> list[LoadView]:
        """All loads but those of instances that are gone."""
        views = (self.view(load, now) for load in self.loads.values())
        return [view for view in views if view.state is not InstanceState.GONE]

    def requests(self, now: float) -> Iterator[tuple[InstanceLoad, SequenceLoad]]:
        """Every request and where it is: reported ones, then those charged only."""
        live = [load for name, load in self.loads.items() if self._lives(name, now)]
        for load in live:
            for sequence in load.sequences:
                yield load, sequence
        for load in live:
            for charge in load.charges.values():
                yield load, charge.sequence

    def _lives(self, instance_id: str, now: float) -> bool:
        return self.state(instance_id, now) is not InstanceState.GONE

    def update_version(self, now: float) -> None:
        """Count up if membership or a state has changed."""
        states = self.table.states(now)
        if states is self._states and not self._renewed:
            return
        if self._renewed or not np.array_equal(states, self._states):
            self._renewed = False
            self.version += 1
        self._states = states

    def cluster_view(self, now: float) -> ClusterView:
        """Membership and load as gateways and operators see them."""
        found = []
        for view in self.views(now):
            sequences = self.loads[view.instance_id].sequences
            running = sum(1 for sequence in sequences if sequence.running)
            promised = view.total - view.free + sum(view.waiting)
            found.append(
                InstanceView(
                    info=view.info,
                    state=view.state.value,
                    freeness=view.placement_freeness(),
                    load=promised / max(1, view.total),
                    free_blocks=view.free,
                    running=running,
                    waiting=len(sequences) - running,
                    step_seconds=view.step_seconds,
                )
            )
        return ClusterView(self.version, tuple(found))
