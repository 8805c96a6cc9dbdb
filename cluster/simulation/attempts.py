"""All migrations of a simulated instance; see ``instance.migration.coordinator``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cluster.simulation.migration import Incoming, Outgoing
from instance.load import MigrationReport
from instance.migration import messages as m
from instance.request import Sequence, SequenceStatus

if TYPE_CHECKING:
    from cluster.simulation.instance import SimulatedInstance


class Attempts:
    """Finds the attempt that an event belongs to; decides nothing itself."""

    def __init__(self, host: SimulatedInstance) -> None:
        self._host = host
        self._outgoing: dict[str, Outgoing] = {}
        self._incoming: dict[str, Incoming] = {}
        self._number = 0

    # ---- figures

    @property
    def num_out(self) -> int:
        return len(self._outgoing)

    @property
    def num_in(self) -> int:
        if not self._incoming:
            return 0
        return sum(1 for one in self._incoming.values() if not one.machine.ended)

    @property
    def reserved_blocks(self) -> int:
        """Blocks that incoming attempts hold outside the scheduler."""
        return sum(len(one.table) for one in self._incoming.values() if one.sequence is None)

    def held_blocks(self) -> list[int]:
        """References to blocks outside the scheduler's sequences."""
        return [block for one in self._incoming.values() for block in one.held]

    def involved(self) -> set[str]:
        """Requests that take part in an attempt here."""
        if not self._outgoing and not self._incoming:
            return set()
        names = {one.machine.request_id for one in self._outgoing.values()}
        names.update(one.machine.request_id for one in self._incoming.values() if one.machine.live)
        return names

    def silent(self) -> set[Sequence]:
        """Sequences of which their homes have not yet decided whether they run here."""
        ours = {one.sequence for one in self._outgoing.values() if one.machine.silent}
        ours.update(
            one.sequence
            for one in self._incoming.values()
            if one.sequence is not None and one.machine.silent
        )
        return ours

    # ---- as source

    def start(
        self,
        request_id: str,
        peer: SimulatedInstance,
        reason: str,
        ended: Callable[[MigrationReport], None],
    ) -> None:
        """Move a request; ``ended`` is told how that went, once."""
        host = self._host
        sequence = host.engine.scheduler.sequences.get(request_id)
        refusal = self._cannot_leave(sequence, peer)
        if refusal or sequence is None:
            ended(
                MigrationReport(request_id, "", host.instance_id, peer.instance_id, reason, refusal)
            )
            return
        self._number += 1
        name = f"{host.incarnation}/{self._number}"

        def over(report: MigrationReport) -> None:
            del self._outgoing[name]
            ended(report)

        attempt = self._outgoing[name] = Outgoing(host, sequence, peer, name, reason, over)
        attempt.start()
        host.report_soon()

    def _cannot_leave(self, sequence: Sequence | None, peer: SimulatedInstance) -> str:
        if sequence is None:
            return "unknown request"
        if peer is self._host:
            return "already there"
        if sequence.status is SequenceStatus.HANDOVER:
            return "in handover already"
        if not self._host.engine.scheduler.can_leave(sequence):
            return "being swapped"
        if sequence.request_id in self.involved():
            return "migrating already"
        if len(self._outgoing) >= self._host.config.migration.max_concurrent:
            return "too many migrations from here"
        return ""

    def from_destination(self, message: object) -> None:
        """A control message of a destination."""
        attempt = self._outgoing.get(message.attempt)  # type: ignore[attr-defined]
        if attempt is not None:
            attempt.handle(message)  # type: ignore[arg-type]

    def tell_source(self, sequence: Sequence, event: m.SourceEvent) -> None:
        """Something happened to a sequence of this instance."""
        for one in list(self._outgoing.values()):
            if one.sequence is sequence:
                one.handle(event)

    # ---- as destination

    def offered(self, offer: m.Offer, sequence: Sequence, source: SimulatedInstance) -> None:
        """A source offers a request."""
        attempt = Incoming(self._host, offer, sequence, source, self._host.config.migration)
        self._incoming[offer.attempt] = attempt
        attempt.start()

    def from_source(self, message: object, source: SimulatedInstance) -> None:
        """A control message of a source."""
        name: str = message.attempt  # type: ignore[attr-defined]
        attempt = self._incoming.get(name)
        if attempt is not None:
            attempt.handle(message)  # type: ignore[arg-type]
        elif isinstance(message, m.Handover):
            cancel = m.CancelMigration(name, "unknown attempt")
            self._host.tell(source, lambda: source.attempts.from_destination(cancel))

    def refusal(self, attempt: Incoming) -> str:
        """Why an offer cannot be taken; "" if it can."""
        host, request_id = self._host, attempt.machine.request_id
        scheduler = host.engine.scheduler
        if host.draining:
            return "draining"
        if attempt.source.engine.model != host.engine.model:
            return "another model, type or block size"
        if request_id in scheduler.sequences or any(
            one is not attempt and one.machine.request_id == request_id and not one.machine.ended
            for one in self._incoming.values()
        ):
            return "the request is here already"
        if self.num_in > host.config.migration.max_concurrent:
            return "too many migrations to here"
        if len(scheduler.running) + self.num_in > scheduler.max_num_seqs:
            return "no batch slot"
        return ""

    def copy_started(self, name: str, stage: int) -> bool:
        """A stage is about to be written; false if nothing of it may be."""
        attempt = self._incoming.get(name)
        if attempt is None:
            return False
        attempt.rejected.discard(stage)
        attempt.handle(m.CopyStarted(stage))
        return stage not in attempt.rejected

    def copy_ended(self, name: str, stage: int, ok: bool) -> None:
        """No byte of a stage will come any more; it is whole if ``ok``."""
        attempt = self._incoming.get(name)
        if attempt is not None:
            attempt.handle(m.CopyEnded(stage, ok))

    # ---- both

    def claim_reply(self, reply: m.ClaimReply) -> None:
        """The home answered a claim."""
        one = self._outgoing.get(reply.attempt) or self._incoming.get(reply.attempt)
        if one is not None:
            one.handle(reply)

    def cancelled(self, request_id: str, epoch: int) -> None:
        """The home voided this epoch of the request and all older ones."""
        attempts: list[Outgoing | Incoming] = [*self._outgoing.values(), *self._incoming.values()]
        for one in attempts:
            if one.machine.request_id == request_id:
                one.handle(m.Cancelled(epoch))

    def peer_lost(self, peer: SimulatedInstance) -> None:
        """The other instance is dead, and all its copies with it."""
        for out in list(self._outgoing.values()):
            if out.peer is peer:
                out.handle(m.PeerLost())
        for one in list(self._incoming.values()):
            if one.source is peer:
                one.handle(m.PeerLost())

    def expire(self, now: float) -> None:
        """Forget attempts that ended long ago."""
        for name, one in list(self._incoming.items()):
            if one.machine.forget_at is not None and now >= one.machine.forget_at:
                del self._incoming[name]
