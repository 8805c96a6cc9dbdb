"""Network, deaths and invariants around the model instances and gateways."""

from __future__ import annotations

import collections
import random
from dataclasses import dataclass, field
from typing import Any

from cluster.gateway.home import Home
from cluster.gateway.home_actions import Peer
from instance.migration import messages as m
from instance.migration.destination import DestinationMigration
from instance.migration.source import SourceMigration
from tests.unit.migration_gateway import Channel, Gateway, Stream
from tests.unit.migration_kv import Seq, Violation
from tests.unit.migration_model import (
    CONFIG,
    Instance,
    Outgoing,
)


@dataclass(frozen=True)
class Parts:
    """The parts under test; mutants replace some."""

    source: type[SourceMigration] = SourceMigration
    destination: type[DestinationMigration] = DestinationMigration
    home: type[Home] = Home
    instance: type[Instance] = Instance


SOUND = Parts()


@dataclass(eq=False)
class Copy:
    """One copy stage on its way; each block is read, and later lands."""

    source: Instance
    out: Outgoing
    destination: Instance
    stage: int
    first: int
    blocks: list[int]
    read: int = 0
    in_flight: list[tuple[int, list[int]]] = field(default_factory=list)
    started: bool = False
    source_done: bool = False


class World:
    """Instances and gateways on a lossy network; every choice comes from one seeded source."""

    def __init__(self, rng: random.Random, parts: Parts = SOUND, instances: int = 3) -> None:
        self.rng = rng
        self.parts = parts
        self.now = 0.0
        self.calm = False
        self.refusing: set[str] = set()
        self.refusals = 0.0
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.attempts = 0
        self._starts = instances
        self.instances = {f"i{n}": parts.instance(self, f"i{n}", n) for n in range(instances)}
        self.gateways = [Gateway(self, "g0"), Gateway(self, "g1")]
        self.channels: list[Channel] = []
        self.doubles: list[tuple[Channel, Any, float]] = []
        self.controls: dict[tuple[str, str], tuple[Stream, Instance, Instance]] = {}
        self.copies: list[Copy] = []
        self.blocked: dict[tuple[str, str], float] = {}
        self.handovers: dict[tuple[str, int, Peer], int] = {}

    # ---- invariants that instances report to

    def gateway_of(self, request_id: str) -> Gateway:
        return next(gateway for gateway in self.gateways if request_id in gateway.clients)

    def check_emission(self, peer: Peer, seq: Seq, index: int) -> None:
        key = (seq.request_id, seq.epoch)
        if self.gateway_of(seq.request_id).owners.get(key) != peer:
            raise Violation(f"{peer} emits {seq.request_id} at epoch {seq.epoch}, not its own")
        handed = self.handovers.get((*key, peer))
        if handed is not None and len(seq.output) > handed:
            raise Violation(f"{peer} goes on with {key} after its handover")

    def ownership_taken(self, peer: Peer, seq: Seq) -> None:
        if self.gateway_of(seq.request_id).owners.get((seq.request_id, seq.epoch)) != peer:
            raise Violation(f"{peer} takes {seq.request_id} without a grant")

    def handed_over(self, peer: Peer, seq: Seq) -> None:
        self.handovers[seq.request_id, seq.epoch, peer] = len(seq.output)

    def check_free(self, peer: Peer, machine: SourceMigration) -> None:
        gateway = self.gateway_of(machine.request_id)
        owned = gateway.epochs[machine.request_id] == machine.epoch
        # A home that was out of reach for the grace period counts as dead, rightly or not.
        link = self.instances[peer.instance_id].links.get(gateway.name)
        reachable = link is not None and link.lost_at is None
        if gateway.is_open(machine.request_id) and owned and reachable:
            raise Violation(f"{peer} frees {machine.request_id}, which it still owns")

    def refuses(self, attempt: str) -> bool:
        if self.calm:
            return False
        if attempt in self.refusing:
            return True
        return self.rng.random() < self.refusals

    # ---- control streams and copies

    def _control(self, source: Instance, destination: Instance) -> Stream | None:
        key = (source.name, destination.name)
        known = self.controls.get(key)
        if known is not None:
            if known[1] is source and known[2] is destination:
                return known[0]
            self.break_control(key)
        if not destination.alive or self.is_blocked(*key):
            return None

        def to_destination(item: tuple[Any, Seq]) -> None:
            destination.from_source(source.name, *item)

        def to_source(message: Any) -> None:
            out = source.outgoing.get(message.attempt)
            if out is not None:
                source.to_source(out, message)

        stream = Stream(
            Channel(to_destination, lambda: destination.alive and not destination.stopped),
            Channel(to_source, lambda: source.alive and not source.stopped),
        )
        self.channels += [stream.down, stream.up]
        self.controls[key] = (stream, source, destination)
        return stream

    def send_control(self, source: Instance, destination: str, message: Any, seq: Seq) -> None:
        stream = self._control(source, self.instances[destination])
        if stream is None:
            return
        template = Seq(
            seq.request_id, seq.home, seq.seed, seq.prompt, seq.limit, seq.epoch,
            list(seq.output), seq.acked,
        )  # fmt: skip
        stream.down.send((message, template))

    def answer_control(self, destination: Instance, source: str, message: Any) -> None:
        known = self.controls.get((source, destination.name))
        if known is not None and known[2] is destination:
            known[0].up.send(message)

    def break_control(self, key: tuple[str, str]) -> None:
        known = self.controls.pop(key, None)
        if known is None:
            return
        stream, source, destination = known
        stream.break_off()
        if source.alive:
            for out in list(source.outgoing.values()):
                if out.destination == destination.name:
                    source.to_source(out, m.PeerLost())
        if destination.alive:
            for incoming in list(destination.incoming.values()):
                if incoming.source == source.name:
                    destination.to_destination(incoming, m.PeerLost())

    def start_copy(
        self, source: Instance, out: Outgoing, stage: int, first: int, blocks: list[int]
    ) -> None:
        destination = self.instances[out.destination]
        self.copies.append(Copy(source, out, destination, stage, first, blocks))

    def advance_copy(self, copy: Copy) -> None:
        """One step of a copy: start, read a block, land one, or end."""
        attempt = copy.out.machine.attempt
        if not copy.started:
            if not copy.destination.alive:
                self.copies.remove(copy)
                self._copy_source_done(copy, ok=False)
                return
            if not copy.destination.copy_started(attempt, copy.stage):
                self.copies.remove(copy)
                self._copy_source_done(copy, ok=False)
                return
            copy.started = True
        elif copy.in_flight and (
            self.rng.random() < 0.6 or copy.read == len(copy.blocks) or copy.source_done
        ):
            self._land(copy, *copy.in_flight.pop(0))
        elif copy.read < len(copy.blocks) and not copy.source_done:
            content = copy.source.pool.read(copy.blocks[copy.read])
            copy.in_flight.append((copy.first + copy.read, content))
            copy.read += 1
        elif not copy.in_flight:
            ok = copy.read == len(copy.blocks) and not copy.source_done
            self.copies.remove(copy)
            self._copy_landed(copy, ok)
            self._copy_source_done(copy, ok)

    def _land(self, copy: Copy, index: int, content: list[int]) -> None:
        destination = copy.destination
        incoming = destination.incoming.get(copy.out.machine.attempt)
        if not destination.alive or incoming is None:
            return
        destination.to_destination(incoming, m.CopyProgress())
        if index >= len(incoming.table):
            raise Violation("a remote write has no block to land in")
        destination.pool.remote_write(incoming.table[index], incoming.machine.attempt, content)

    def _copy_landed(self, copy: Copy, ok: bool) -> None:
        incoming = copy.destination.incoming.get(copy.out.machine.attempt)
        if copy.destination.alive and incoming is not None:
            copy.destination.to_destination(incoming, m.CopyEnded(copy.stage, ok))

    def _copy_source_done(self, copy: Copy, ok: bool) -> None:
        if copy.source.alive and not copy.source_done:
            copy.source_done = True
            copy.source.copy_done(copy.out, copy.stage, copy.blocks, ok)

    def fail_copy(self, copy: Copy) -> None:
        """The source's call fails at once; what was read may still land."""
        if not copy.started:
            self.copies.remove(copy)
        if not copy.source.alive:
            copy.source_done = True
        self._copy_source_done(copy, ok=False)

    # ---- streams to homes

    def is_blocked(self, *pair: str) -> bool:
        return self.blocked.get((min(pair), max(pair)), 0.0) > self.now

    def block(self, one: str, other: str, seconds: float) -> None:
        self.blocked[min(one, other), max(one, other)] = self.now + seconds

    def connect(self, gateway: Gateway, instance: Instance) -> None:
        """Open the stream if it is down and both ends can."""
        link = gateway.link_to(instance)
        if link.stream is not None or not self.can_talk(gateway, instance):
            return
        stream = link.stream = Stream(
            Channel(
                lambda message: instance.from_home(gateway.name, message),
                lambda: instance.alive and not instance.stopped,
            ),
            Channel(lambda message: gateway.received(link, message), lambda: gateway.alive),
        )
        self.channels += [stream.down, stream.up]
        instance.open_stream(gateway.name, stream)

    def can_talk(self, gateway: Gateway, instance: Instance) -> bool:
        both = gateway.alive and instance.alive and not instance.stopped
        return both and not self.is_blocked(gateway.name, instance.name)

    def break_home_stream(self, gateway: Gateway, name: str, stream: Stream) -> None:
        stream.break_off()
        link = gateway.links.get(name)
        if link is not None and link.stream is stream:
            if link.up:
                link.lost_at = self.now
            link.stream, link.up = None, False
        instance = self.instances[name]
        at_instance = instance.links.get(gateway.name)
        if instance.alive and at_instance is not None and at_instance.stream is stream:
            instance.stream_lost(gateway.name)

    def cut_home(self, gateway: Gateway, instance: Instance, seconds: float) -> None:
        self.block(gateway.name, instance.name, seconds)
        link = gateway.links.get(instance.name)
        if link is not None and link.stream is not None:
            self.break_home_stream(gateway, instance.name, link.stream)

    # ---- deaths

    def crash(self, instance: Instance) -> None:
        """The process dies with all it held; a new incarnation starts in its place."""
        instance.alive = False
        for gateway in self.gateways:
            link = gateway.links.get(instance.name)
            if link is not None and link.stream is not None:
                self.break_home_stream(gateway, instance.name, link.stream)
        for key in [key for key in self.controls if instance.name in key]:
            self.break_control(key)
        for copy in list(self.copies):
            if copy.destination is instance:
                self.copies.remove(copy)
                self._copy_source_done(copy, ok=False)
            elif copy.source is instance:
                copy.source_done = True
                if not copy.started:
                    self.copies.remove(copy)
        self._starts += 1
        name = instance.name
        self.instances[name] = self.parts.instance(self, name, self._starts)

    def kill_gateway(self, gateway: Gateway) -> None:
        for name, link in list(gateway.links.items()):
            if link.stream is not None:
                self.break_home_stream(gateway, name, link.stream)
        gateway.alive = False
        gateway.places.clear()

    # ---- the ordinary course of things

    def deliver(self, channel: Channel, index: int = 0) -> None:
        channel.deliver(channel.queue.pop(index))

    def deliver_double(self) -> None:
        """A message arrives a second time, long after the first.

        Not after tombstones have expired: what such a submit starts is harmless, because its
        home voids it, but the checks here would not know it from a broken tombstone.
        """
        channel, message, since = self.doubles.pop(self.rng.randrange(len(self.doubles)))
        if channel.open and channel.ready() and self.now - since < CONFIG.grace / 2:
            channel.deliver(message)

    def deliverable(self) -> list[Channel]:
        self.channels = [channel for channel in self.channels if channel.open]
        return [channel for channel in self.channels if channel.queue and channel.ready()]

    def answer_place(self, gateway: Gateway, instance: Instance) -> None:
        place = gateway.places.pop(self.rng.randrange(len(gateway.places)))
        gateway.link_to(instance)
        gateway.execute(gateway.core.placed(place.request_id, place.epoch, instance.peer))

    def migrate(self, source: Instance, seq: Seq, destination: str) -> None:
        self.attempts += 1
        source.migrate(seq, destination, f"a{self.attempts}")

    def advance(self, seconds: float) -> None:
        self.now += seconds
        for gateway in self.gateways:
            if gateway.alive:
                gateway.judge()
        for instance in list(self.instances.values()):
            if not instance.stopped:
                instance.tick()

    # ---- rest

    def quiesce(self) -> None:
        """End all faults, let everything run out, and check what is left."""
        self.calm = True
        self.blocked.clear()
        self.refusing.clear()
        for instance in self.instances.values():
            instance.stopped = False
        limit = self.now + 90.0
        while not self._at_rest():
            if self.now > limit:
                raise Violation(f"stuck: {self.describe()}")
            self._calm_round()
        self._check_rest()

    def _calm_round(self) -> None:
        for gateway in self.gateways:
            if not gateway.alive:
                continue
            for instance in list(self.instances.values()):
                self.connect(gateway, instance)
            for _ in range(len(gateway.places)):
                self.answer_place(gateway, self.rng.choice(list(self.instances.values())))
        if self.doubles:
            self.deliver_double()
        for _ in range(3):
            while ready := self.deliverable():
                for channel in ready:
                    if channel.queue and channel.ready():
                        self.deliver(channel)
            for copy in list(self.copies):
                for _ in range(4):
                    if copy in self.copies:
                        self.advance_copy(copy)
            for instance in list(self.instances.values()):
                if instance.step is not None:
                    instance.complete()
                if instance.can_launch():
                    instance.launch()
        self.advance(0.25)

    def _at_rest(self) -> bool:
        return (
            not self.copies
            and not any(
                instance.seqs
                or instance.ended
                or instance.outgoing
                or instance.step
                or any(not entry.machine.ended for entry in instance.incoming.values())
                for instance in self.instances.values()
            )
            and not any(
                gateway.is_open(request_id)
                for gateway in self.gateways
                for request_id in gateway.clients
            )
        )

    def _check_rest(self) -> None:
        for instance in self.instances.values():
            instance.pool.check_empty()
        self.now += CONFIG.lease + CONFIG.grace + 1.0
        for instance in self.instances.values():
            instance.tick()
            instance.registry.expire(self.now)
            if instance.incoming or len(instance.registry):
                raise Violation(f"{instance.name} remembers ended requests for ever")
        for gateway in self.gateways:
            if gateway.alive and (gateway.core.requests or gateway.core._held):
                raise Violation("the home remembers closed requests")

    def describe(self) -> str:
        lines = [f"t={self.now:.2f}"]
        for instance in self.instances.values():
            lines += [
                f"{instance.name}: {seq.request_id}@{seq.epoch} {seq.status} {len(seq.output)}"
                for seq in (*instance.seqs.values(), *instance.ended.values())
            ]
            lines += [
                f"{instance.name}: {entry.machine.attempt} {entry.machine.state}"
                for entry in (*instance.outgoing.values(), *instance.incoming.values())
            ]
        for gateway in self.gateways:
            lines += [
                f"{gateway.name}: {owned.request_id}@{owned.epoch} at {owned.holder}"
                for owned in gateway.core.requests.values()
                if gateway.alive
            ]
        return "; ".join(lines)
