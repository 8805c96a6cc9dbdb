"""Random schedules over the migration world, with faults aimed at chosen protocol stages."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from instance.migration.destination import DestinationMigration, DestinationState
from instance.migration.source import SourceMigration, SourceState
from instance.request import SequenceStatus
from tests.unit.migration_gateway import Channel, Client, Gateway, Stream
from tests.unit.migration_kv import Seq
from tests.unit.migration_model import Instance, Welcome
from tests.unit.migration_world import SOUND, Parts, World

STAGES = [
    *(
        f"source.{state}"
        for state in SourceState
        if state not in (SourceState.NEW, SourceState.ENDED)
    ),
    *(
        f"destination.{state}"
        for state in DestinationState
        if state not in (DestinationState.NEW, DestinationState.ENDED)
    ),
]


@dataclass(frozen=True)
class Attempt:
    """One side of a migration attempt as the faults see it."""

    machine: SourceMigration | DestinationMigration
    stage: str
    source: Instance
    destination: Instance
    gateway: Gateway
    seq: Seq


class Explorer:
    """Drives one world with random choices.

    Args:
        seed: Decides everything.
        parts: What is under test.
        target: (stage, fault) to inject once as soon as an attempt is at that stage.
    """

    def __init__(
        self,
        seed: int | str,
        parts: Parts = SOUND,
        target: tuple[str, str] | None = None,
    ) -> None:
        self.rng = rng = random.Random(seed)
        self.world = World(rng, parts, instances=rng.choice((2, 3)))
        self.target = target
        self.covered: set[tuple[str, str]] = set()
        self.resumes: dict[Instance, float] = {}
        self.reorders = rng.random() < 0.4
        self.fault_rate = rng.choice((0.0, 0.01, 0.04))
        self.world.refusals = rng.choice((0.0, 0.1))
        self.copy_weight = rng.choice((2, 8))
        self.prompts = (3, 8, 8, 24)
        if target is not None and target[0].endswith(("extending", "detached")):
            # Sequences that grow fast while their copies are slow need more blocks.
            self.copy_weight, self.prompts = 2, (24, 24, 8)
        self._numbers = iter(range(1000))

    def run(self, actions: int = 220) -> World:
        """Explore, then let the world come to rest and check it."""
        for _ in range(self.rng.randint(2, 4)):
            self.open_client()
        left = actions
        while left > 0:
            left -= 1
            self.act()
            if self.target is not None and self.try_target():
                left = min(left, 70)
        self.world.quiesce()
        return self.world

    def open_client(self) -> None:
        rng = self.rng
        number = next(self._numbers)
        alive = [gateway for gateway in self.world.gateways if gateway.alive]
        if not alive:
            return
        # Few different prompts, so that instances have cached prefixes of each other.
        prompt = tuple(range(100, 100 + rng.choice(self.prompts)))
        client = Client(f"r{number}", rng.randrange(4), prompt, rng.randint(4, 16))
        rng.choice(alive).open(client)

    # ---- one action

    def act(self) -> None:
        world, rng = self.world, self.rng
        for instance, until in list(self.resumes.items()):
            if until <= world.now:
                instance.stopped = False
                del self.resumes[instance]
        options: list[tuple[float, Callable[[], None]]] = [
            (2.0, self.pass_time),
            (0.15, self.open_client),
            (self.fault_rate * 20, self.random_fault),
        ]
        ready = world.deliverable()
        if ready:
            options.append((8.0, lambda: self.deliver(rng.choice(ready))))
        if world.doubles:
            options.append((0.3, world.deliver_double))
        if world.copies:
            copy = rng.choice(world.copies)
            options.append((self.copy_weight, lambda: world.advance_copy(copy)))
        for gateway in world.gateways:
            if gateway.places:
                options.append((4.0, lambda gateway=gateway: self.place(gateway)))
        running = [instance for instance in world.instances.values() if not instance.stopped]
        if running:
            options.append((5.0, lambda: self.step(rng.choice(running))))
            options.append((2.0, lambda: self.migrate(rng.choice(running))))
            options.append((1.5, lambda: self.connect(rng.choice(running))))
        weights = [weight for weight, _ in options]
        rng.choices([call for _, call in options], weights)[0]()

    def deliver(self, channel: Channel) -> None:
        rng, world = self.rng, self.world
        queue = channel.queue
        index = 0
        if self.reorders and not isinstance(queue[0], Welcome):
            if rng.random() < 0.15:
                index = rng.randrange(len(queue))
            if rng.random() < 0.1:
                world.doubles.append((channel, queue[index], world.now))
        world.deliver(channel, index)

    def pass_time(self) -> None:
        self.world.advance(self.rng.choice((0.01, 0.05, 0.05, 0.2, 0.4)))

    def place(self, gateway: Gateway) -> None:
        self.world.answer_place(gateway, self.rng.choice(list(self.world.instances.values())))

    def connect(self, instance: Instance) -> None:
        for gateway in self.world.gateways:
            if gateway.alive:
                self.world.connect(gateway, instance)

    def step(self, instance: Instance) -> None:
        if instance.step is not None:
            instance.complete()
        elif instance.can_launch():
            instance.launch()

    def migrate(self, instance: Instance) -> None:
        seqs = [seq for seq in instance.seqs.values() if instance.can_migrate(seq)]
        others = [name for name in self.world.instances if name != instance.name]
        if seqs:
            self.world.migrate(instance, self.rng.choice(seqs), self.rng.choice(others))

    # ---- faults

    def attempts(self) -> Iterator[Attempt]:
        world = self.world
        for instance in world.instances.values():
            for out in instance.outgoing.values():
                yield Attempt(
                    out.machine,
                    f"source.{out.machine.state}",
                    instance,
                    world.instances[out.destination],
                    world.gateway_of(out.seq.request_id),
                    out.seq,
                )
            for incoming in instance.incoming.values():
                if not incoming.machine.ended:
                    yield Attempt(
                        incoming.machine,
                        f"destination.{incoming.machine.state}",
                        world.instances[incoming.source],
                        instance,
                        world.gateway_of(incoming.machine.request_id),
                        incoming.seq or incoming.template,
                    )

    def try_target(self) -> bool:
        assert self.target is not None
        stage, fault = self.target
        if self.target in self.covered:
            return True
        attempts = list(self.attempts())
        here = [attempt for attempt in attempts if attempt.stage == stage]
        if here and self.rng.random() < 0.4:
            self.inject(self.rng.choice(here), fault)
        elif not here and stage in _LEAD_IN and self.rng.random() < 0.2:
            earlier, cause = _LEAD_IN[stage]
            before = [attempt for attempt in attempts if attempt.stage == earlier]
            if before:
                self.inject(self.rng.choice(before), cause)
        return False

    def random_fault(self) -> None:
        here = list(self.attempts())
        if here:
            fault = self.rng.choice([name for name in FAULTS if name != "home_dies"])
            self.inject(self.rng.choice(here), fault)

    def inject(self, attempt: Attempt, fault: str) -> None:
        if FAULTS[fault](self, attempt):
            self.covered.add((attempt.stage, fault))


Fault = Callable[[Explorer, Attempt], bool]


def _crash(side: str) -> Fault:
    def fault(explorer: Explorer, attempt: Attempt) -> bool:
        explorer.world.crash(getattr(attempt, side))
        return True

    return fault


def _stop(side: str) -> Fault:
    def fault(explorer: Explorer, attempt: Attempt) -> bool:
        instance: Instance = getattr(attempt, side)
        instance.stopped = True
        seconds = explorer.rng.choice((0.3, 1.5, 3.0, 8.0))
        explorer.resumes[instance] = explorer.world.now + seconds
        if explorer.rng.random() < 0.5:
            explorer.world.cut_home(attempt.gateway, instance, seconds)
        return True

    return fault


def _cut_home(side: str) -> Fault:
    def fault(explorer: Explorer, attempt: Attempt) -> bool:
        seconds = explorer.rng.choice((0.01, 0.5, 2.0, 6.0))
        explorer.world.cut_home(attempt.gateway, getattr(attempt, side), seconds)
        return True

    return fault


def _given_up(side: str) -> Fault:
    """The home counts a living instance as gone."""

    def fault(explorer: Explorer, attempt: Attempt) -> bool:
        name = getattr(attempt, side).name
        if not attempt.gateway.alive or name not in attempt.gateway.links:
            return False
        attempt.gateway.give_up(name)
        return True

    return fault


def _cut_control(explorer: Explorer, attempt: Attempt) -> bool:
    key = (attempt.source.name, attempt.destination.name)
    explorer.world.block(*key, explorer.rng.choice((0.01, 0.5, 3.0)))
    explorer.world.break_control(key)
    return True


def _home_dies(explorer: Explorer, attempt: Attempt) -> bool:
    if not attempt.gateway.alive:
        return False
    explorer.world.kill_gateway(attempt.gateway)
    return True


def _client_leaves(explorer: Explorer, attempt: Attempt) -> bool:
    request_id = attempt.machine.request_id
    if not attempt.gateway.is_open(request_id):
        return False
    attempt.gateway.close(attempt.gateway.clients[request_id])
    return True


def _silence(explorer: Explorer, attempt: Attempt) -> bool:
    """Time passes and no message arrives."""
    for _ in range(explorer.rng.choice((2, 4, 10))):
        explorer.world.advance(0.55)
    return True


def _queues(explorer: Explorer, attempt: Attempt) -> list[list[object]]:
    names = (attempt.source.name, attempt.destination.name)
    streams: list[Stream] = []
    control = explorer.world.controls.get(names)
    if control is not None:
        streams.append(control[0])
    for name in names:
        link = attempt.gateway.links.get(name)
        if link is not None and link.stream is not None:
            streams.append(link.stream)
    queues = [channel.queue for stream in streams for channel in (stream.down, stream.up)]
    return [queue for queue in queues if queue and not isinstance(queue[0], Welcome)]


def _double(explorer: Explorer, attempt: Attempt) -> bool:
    queues = _queues(explorer, attempt)
    for queue in queues:
        queue.extend(list(queue))
    return bool(queues)


def _reorder(explorer: Explorer, attempt: Attempt) -> bool:
    queues = [queue for queue in _queues(explorer, attempt) if len(queue) > 1]
    for queue in queues:
        explorer.rng.shuffle(queue)
    return bool(queues)


def _preempt(explorer: Explorer, attempt: Attempt) -> bool:
    seq = attempt.source.seqs.get(attempt.machine.request_id)
    if seq is None or seq.status is not SequenceStatus.RUNNING or not seq.table:
        return False
    attempt.source.preempt(seq)
    return True


def _refuse(explorer: Explorer, attempt: Attempt) -> bool:
    explorer.world.refusing.add(attempt.machine.attempt)
    return True


def _fail_copy(explorer: Explorer, attempt: Attempt) -> bool:
    name = attempt.machine.attempt
    copies = [copy for copy in explorer.world.copies if copy.out.machine.attempt == name]
    for copy in copies:
        explorer.world.fail_copy(copy)
    return bool(copies)


FAULTS: dict[str, Fault] = {
    "source_crashes": _crash("source"),
    "destination_crashes": _crash("destination"),
    "source_stops": _stop("source"),
    "destination_stops": _stop("destination"),
    "source_cut_from_home": _cut_home("source"),
    "destination_cut_from_home": _cut_home("destination"),
    "source_given_up": _given_up("source"),
    "destination_given_up": _given_up("destination"),
    "control_cut": _cut_control,
    "home_dies": _home_dies,
    "client_leaves": _client_leaves,
    "silence": _silence,
    "doubled": _double,
    "reordered": _reorder,
    "preempted": _preempt,
    "refused": _refuse,
    "copy_failed": _fail_copy,
}

# Stages that only trouble leads to.
_LEAD_IN = {
    "source.stopping": ("source.detaching", "control_cut"),
    "source.claiming": ("source.handed_over", "silence"),
    "destination.stopping": ("destination.reserved", "control_cut"),
}

# Faults that can only happen while the sequence is in the batch, blocks are being asked
# for, or a copy is on its way.
_ONLY_AT = {
    "preempted": {
        "source.offered",
        "source.copying",
        "source.extending",
        "source.detaching",
        "source.stopping",
        "destination.reserving",
        "destination.reserved",
        "destination.extending",
    },
    "refused": {
        "source.offered",
        "source.extending",
        "source.detached",
        "destination.reserving",
        "destination.extending",
    },
    "copy_failed": {
        "source.copying",
        "source.handed_over",
        "source.claiming",
        "destination.reserved",
        "destination.handed_over",
        "destination.stopping",
    },
}

PAIRS = [
    (stage, fault) for stage in STAGES for fault in FAULTS if stage in _ONLY_AT.get(fault, {stage})
]


def explore_pair(
    target: tuple[str, str],
    seeds: int,
    parts: Parts = SOUND,
) -> tuple[int, collections.Counter[str]]:
    """Aim at one pair until ``seeds`` runs have hit it; how many did, and how attempts ended."""
    hits, outcomes = 0, collections.Counter[str]()
    for number in range(seeds * 100):
        explorer = Explorer(f"{target}{number}", parts, target)
        outcomes += explorer.run().outcomes
        hits += target in explorer.covered
        if hits == seeds:
            break
    return hits, outcomes
