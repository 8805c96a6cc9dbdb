"""The instances that the dispatcher knows, and the migrations between them."""

from __future__ import annotations

from collections.abc import Iterator

from cluster.dispatcher.load import (
    InstanceLoad,
    InstanceState,
    LoadConfig,
    LoadView,
    Transfer,
)
from cluster.dispatcher.messages import ClusterView, InstanceView
from instance.load import InstanceInfo, LoadReport, SequenceLoad


class Members:
    """Membership, loads and views.

    Args:
        config: How long reports are trusted.
        version: First version of the membership.

    Attributes:
        loads: By instance id; those gone are kept for a while, since they may come back.
        transfers: Migrations under way, by request id.
        version: Changes whenever membership or an instance's state does.
    """

    def __init__(self, config: LoadConfig, version: int) -> None:
        self.loads: dict[str, InstanceLoad] = {}
        self.transfers: dict[str, Transfer] = {}
        self.version = version
        self._config = config
        self._states: dict[str, tuple[str, str]] = {}

    def join(self, info: InstanceInfo, now: float) -> str:
        """Take an instance in; returns "joined", "restarted" or "known"."""
        load = self.loads.get(info.instance_id)
        if load is not None and load.info.incarnation == info.incarnation:
            load.info = info
            load.heard = now
            load.left = False
            return "known"
        self.loads[info.instance_id] = InstanceLoad(info, now)
        if load is None:
            return "joined"
        self.loads[info.instance_id].draining = load.draining
        for transfer in list(self.transfers.values()):
            if info.instance_id in (transfer.source, transfer.destination):
                del self.transfers[transfer.sequence.request_id]
        return "restarted"

    def leave(self, instance_id: str, incarnation: str) -> bool:
        """An instance stops; false if it is not known."""
        if not self.knows(instance_id, incarnation):
            return False
        self.loads[instance_id].left = True
        self.loads[instance_id].charges.clear()
        return True

    def knows(self, instance_id: str, incarnation: str) -> bool:
        """Whether reports of this incarnation are understood; if not, it must join again."""
        load = self.loads.get(instance_id)
        return load is not None and load.info.incarnation == incarnation

    def report(self, report: LoadReport, now: float) -> str:
        """Take a report; returns "accepted", "stale" or "unknown"."""
        if not self.knows(report.instance_id, report.incarnation):
            return "unknown"
        return "accepted" if self.loads[report.instance_id].accept(report, now) else "stale"

    def state(self, instance_id: str, now: float) -> InstanceState:
        """The state of an instance; GONE if it is not known."""
        load = self.loads.get(instance_id)
        return InstanceState.GONE if load is None else load.state(now, self._config)

    def expire(self, now: float) -> int:
        """Forget old charges and instances long gone; returns the charges forgotten."""
        expired = 0
        for name, load in list(self.loads.items()):
            expired += load.expire(now - self._config.charge_lifetime)
            if load.state(now, self._config) is InstanceState.GONE:
                load.charges.clear()
                if now - load.heard > self._config.forget_after:
                    del self.loads[name]
        return expired

    def release(self, request_id: str, epoch: int) -> None:
        """Forget the charges of a request up to ``epoch``."""
        for load in self.loads.values():
            load.release(request_id, epoch)

    def settled(self, instance_id: str) -> bool:
        """Whether its report is younger than its last migration and none is under way."""
        load = self.loads[instance_id]
        return (
            load.report is not None
            and load.heard > load.settled
            and not any(
                instance_id in (transfer.source, transfer.destination)
                for transfer in self.transfers.values()
            )
        )

    def staying(self, instance_id: str) -> list[SequenceLoad]:
        """Reported sequences that are not on their way elsewhere, in queue order."""
        return [
            sequence
            for sequence in self.loads[instance_id].sequences
            if sequence.request_id not in self.transfers
        ]

    def view(self, load: InstanceLoad, now: float) -> LoadView:
        """The load of one instance, transfers under way included."""
        name = load.info.instance_id
        transfers = self.transfers.values()
        return load.view(
            now,
            self._config,
            tuple(t for t in transfers if t.destination == name),
            tuple(t for t in transfers if t.source == name),
        )

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
        states = {
            name: (load.info.incarnation, load.state(now, self._config).value)
            for name, load in self.loads.items()
            if self._lives(name, now)
        }
        if states != self._states:
            self._states = states
            self.version += 1

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
