"""Builders and a model world for the dispatcher's tests."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, fields

from cluster.dispatcher.core import Dispatcher, DispatcherConfig
from cluster.dispatcher.events import (
    Action,
    Joined,
    MigrationEnded,
    Place,
    PlaceRequested,
    Reported,
    SetDraining,
    StartMigration,
    Tick,
)
from cluster.dispatcher.messages import PlaceRequest
from cluster.dispatcher.requests import RequestConfig
from instance.budget import StepCosts
from instance.executor import ModelDescription
from instance.load import InstanceInfo, LoadReport, MigrationReport, SequenceLoad
from instance.request import RequestClass

BLOCK_SIZE = 16
MODEL = ModelDescription(
    name="tiny",
    dtype="float32",
    block_size=BLOCK_SIZE,
    num_layers=2,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=128,
    max_model_len=4096,
)


def info(name: str, incarnation: str = "a", blocks: int = 1000, slots: int = 64) -> InstanceInfo:
    return InstanceInfo(name, incarnation, f"{name}:1", "node", MODEL, blocks, slots)


def ask(request_id: str, epoch: int = 1, tokens: int = 100, **more) -> PlaceRequest:
    return PlaceRequest(
        request_id=request_id,
        epoch=epoch,
        gateway_id="gateway-0",
        tenant=more.pop("tenant", "default"),
        request_class=more.pop("request_class", RequestClass.STANDARD),
        num_tokens=tokens,
        max_tokens=64,
        arrival=more.pop("arrival", 0.0),
        **more,
    )


def sequence(
    request_id: str,
    blocks: int = 10,
    running: bool = True,
    epoch: int = 1,
    request_class: RequestClass = RequestClass.STANDARD,
    migrating: bool = False,
) -> SequenceLoad:
    return SequenceLoad(
        request_id=request_id,
        epoch=epoch,
        tenant="default",
        request_class=request_class,
        home="gateway-0",
        running=running,
        blocks=blocks,
        num_tokens=blocks * BLOCK_SIZE,
        migrating=migrating,
    )


def report(
    name: str,
    number: int,
    sequences: tuple[SequenceLoad, ...] = (),
    incarnation: str = "a",
    blocks: int = 1000,
    draining: bool = False,
    costs: StepCosts | None = None,
) -> LoadReport:
    used = sum(s.blocks for s in sequences if s.running)
    return LoadReport(
        instance_id=name,
        incarnation=incarnation,
        number=number,
        total_blocks=blocks,
        free_blocks=blocks - used,
        reserved_blocks=0,
        step_seconds=0.01,
        sequences=sequences,
        draining=draining,
        costs=costs,
    )


REQUEST_SETTINGS = {field.name for field in fields(RequestConfig)}


def dispatcher(**settings) -> Dispatcher:
    """A dispatcher; settings may be those of ``DispatcherConfig`` and ``RequestConfig``."""
    own = {name: settings.pop(name) for name in REQUEST_SETTINGS & settings.keys()}
    config = DispatcherConfig(requests=RequestConfig(**own), **settings)
    return Dispatcher(config, random.Random(0))


def placed(actions: list[Action]) -> list[str]:
    return [action.placement.instance_id for action in actions if isinstance(action, Place)]


@dataclass
class World:
    """Instances that run what they are given and move what they are told to.

    Sequences never end by themselves, so that only the dispatcher changes the load.
    """

    core: Dispatcher
    blocks: int = 1000
    slots: int = 64
    now: float = 0.0
    held: dict[str, dict[str, SequenceLoad]] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    draining: set[str] = field(default_factory=set)
    moves: list[StartMigration] = field(default_factory=list)
    under_way: list[StartMigration] = field(default_factory=list)

    def join(self, name: str) -> None:
        self.held[name] = {}
        self.numbers[name] = 0
        self.take(self.core.handle(Joined(info(name, "a", self.blocks, self.slots)), self.now))
        self.report(name)

    def report(self, name: str) -> None:
        free = self.blocks
        listed, waiting = [], []
        for held in self.held[name].values():
            if free >= held.blocks and len(listed) < self.slots and not waiting:
                free -= held.blocks
                listed.append(held)
            else:
                waiting.append(
                    sequence(held.request_id, held.blocks, False, held.epoch, held.request_class)
                )
        self.numbers[name] += 1
        self.take(
            self.core.handle(
                Reported(
                    report(
                        name,
                        self.numbers[name],
                        (*listed, *waiting),
                        blocks=self.blocks,
                        draining=name in self.draining,
                    )
                ),
                self.now,
            )
        )

    def place(self, request: PlaceRequest) -> None:
        self.take(self.core.handle(PlaceRequested(request), self.now))

    def take(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Place):
                self.held[action.placement.instance_id][action.placement.request_id] = sequence(
                    action.placement.request_id, 7, epoch=action.placement.epoch
                )
            elif isinstance(action, StartMigration):
                self.moves.append(action)
                self.under_way.append(action)
            elif isinstance(action, SetDraining):
                (self.draining.add if action.on else self.draining.discard)(action.instance_id)

    def end_migrations(self, outcome: str = "moved") -> None:
        under_way, self.under_way = self.under_way, []
        for move in under_way:
            target = move.destination.instance_id
            if outcome == "moved":
                held = self.held[move.source].pop(move.request_id)
                self.held[target][move.request_id] = sequence(
                    held.request_id, held.blocks, True, held.epoch + 1, held.request_class
                )
            ended = MigrationReport(move.request_id, "1", move.source, target, move.reason, outcome)
            self.take(self.core.handle(MigrationEnded(ended), self.now))

    def run(self, seconds: float, outcome: str = "moved") -> None:
        """Half-second rounds: reports, a tick, and the end of what was started before."""
        for _ in range(round(seconds / 0.5)):
            self.now += 0.5
            self.end_migrations(outcome)
            for name in self.held:
                self.report(name)
            self.take(self.core.handle(Tick(), self.now))
