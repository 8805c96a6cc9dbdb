"""The model shell of a home, and the streams that lead to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.gateway.home_actions import (
    Deliver,
    HomeAction,
    Peer,
    Place,
    SendAsk,
    SendCancel,
    SendClaimReply,
    SendSubmit,
)
from instance.migration import messages as m
from instance.request import FinishReason
from tests.unit.migration_kv import Violation, draw
from tests.unit.migration_model import (
    Ack,
    Ask,
    Cancel,
    Frame,
    Holdings,
    Instance,
    Lost,
    Submit,
    Welcome,
)

if TYPE_CHECKING:
    from tests.unit.migration_world import World


@dataclass(eq=False)
class Channel:
    """One direction of a stream. In order, unless the world reorders it."""

    deliver: Callable[[Any], None]
    ready: Callable[[], bool]
    queue: list[Any] = field(default_factory=list)
    open: bool = True

    def send(self, message: Any) -> None:
        if self.open:
            self.queue.append(message)


@dataclass(eq=False)
class Stream:
    """Both directions between two parties; what is in flight is lost when it breaks."""

    down: Channel
    up: Channel

    def break_off(self) -> None:
        for channel in (self.down, self.up):
            channel.open = False
            channel.queue.clear()


@dataclass(eq=False)
class Link:
    """The gateway's side of its stream to one instance."""

    peer: Peer
    stream: Stream | None = None
    up: bool = False
    lost_at: float = 0.0
    frames: set[int] = field(default_factory=set)
    acked: int = 0


@dataclass(eq=False)
class Client:
    """What a client asked and got."""

    request_id: str
    seed: int
    prompt: tuple[int, ...]
    limit: int
    received: list[int] = field(default_factory=list)
    finished: bool = False
    closed: bool = False


class Gateway:
    """The shell of one home."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.alive = True
        self.core = world.parts.home()
        # Below and above the grace period after which instances give up a home.
        self.patience = world.rng.choice((1.5, 1.5, 6.0))
        self.links: dict[str, Link] = {}
        self.clients: dict[str, Client] = {}
        self.places: list[Place] = []
        # Ownership as the messages show it, apart from the core's own state.
        self.epochs: dict[str, int] = {}
        self.owners: dict[tuple[str, int], Peer] = {}
        self._speaker: tuple[Peer, int] | None = None

    def open(self, client: Client) -> None:
        self.clients[client.request_id] = client
        self.execute(self.core.add(client.request_id))

    def close(self, client: Client) -> None:
        client.closed = True
        self.execute(self.core.close(client.request_id))

    def is_open(self, request_id: str) -> bool:
        client = self.clients[request_id]
        return self.alive and not client.finished and not client.closed

    def link_to(self, instance: Instance) -> Link:
        """The link to this incarnation; one to an older incarnation is given up."""
        link = self.links.get(instance.name)
        if link is not None and link.peer != instance.peer:
            self.give_up(instance.name)
            link = None
        if link is None:
            link = self.links[instance.name] = Link(instance.peer, lost_at=self.world.now)
        return link

    def judge(self) -> None:
        """Instances that are out of reach for too long count as gone."""
        for name, link in list(self.links.items()):
            if not link.up and self.world.now - link.lost_at > self.patience:
                self.give_up(name)

    def give_up(self, name: str) -> None:
        link = self.links.pop(name)
        if link.stream is not None:
            self.world.break_home_stream(self, name, link.stream)
        self.execute(self.core.gone(link.peer))

    def received(self, link: Link, message: Any) -> None:
        core, peer = self.core, link.peer
        match message:
            case Welcome():
                link.up = True
                link.frames.clear()
                link.acked = 0
                core.connected(peer)
            case Frame():
                self._speaker = (peer, message.epoch)
                actions = core.tokens(
                    peer,
                    message.request_id,
                    message.epoch,
                    message.index,
                    message.tokens,
                    FinishReason.LENGTH if message.finished else FinishReason.NOT_FINISHED,
                )
                self.execute(actions)
                self._speaker = None
                link.frames.add(message.number)
                while link.acked + 1 in link.frames:
                    link.acked += 1
                self.send(peer, Ack(link.acked))
            case m.Claim():
                actions = core.claim(
                    peer,
                    message.request_id,
                    message.epoch,
                    message.attempt,
                    message.index,
                    message.tokens,
                )
                self.execute(actions)
            case Holdings():
                self.execute(core.holdings(peer, message.submits, message.held))
            case Lost():
                self.execute(core.lost(peer, message.request_id, message.epoch))

    def send(self, peer: Peer, message: Any) -> None:
        link = self.links.get(peer.instance_id)
        if link is not None and link.peer == peer and link.up and link.stream is not None:
            link.stream.down.send(message)

    def execute(self, actions: list[HomeAction]) -> None:
        for action in actions:
            match action:
                case Place():
                    self._advance(action.request_id, action.epoch, None)
                    self.places.append(action)
                case Deliver():
                    self._deliver(action)
                case SendSubmit(peer, request_id, epoch):
                    self._advance(request_id, epoch, peer)
                    client = self.clients[request_id]
                    submit = Submit(
                        request_id,
                        epoch,
                        peer.incarnation,
                        client.seed,
                        client.prompt,
                        client.limit,
                        tuple(client.received),
                    )
                    self.send(peer, submit)
                case SendCancel(peer, request_id, epoch):
                    self.send(peer, Cancel(request_id, epoch))
                case SendAsk(peer, request_id, epoch, index):
                    self.send(peer, Ask(request_id, epoch, index))
                case SendClaimReply(peer, request_id, epoch, attempt, outcome, new, index):
                    if outcome is m.ClaimOutcome.GRANTED:
                        self._advance(request_id, new, peer)
                    self.send(peer, m.ClaimReply(request_id, epoch, attempt, outcome, new, index))

    def _advance(self, request_id: str, epoch: int, owner: Peer | None) -> None:
        if epoch < self.epochs.get(request_id, 0):
            raise Violation(f"{request_id} goes back to epoch {epoch}")
        self.epochs[request_id] = epoch
        if owner is not None and self.owners.setdefault((request_id, epoch), owner) != owner:
            raise Violation(f"two owners of {request_id} at epoch {epoch}")

    def _deliver(self, action: Deliver) -> None:
        client = self.clients[action.request_id]
        if client.finished or client.closed:
            raise Violation(f"tokens for {action.request_id} after its end")
        if action.index != len(client.received):
            raise Violation(f"{action.request_id} got index {action.index} out of order")
        for token in action.tokens:
            if token != draw(client.seed, len(client.received)):
                raise Violation(f"{action.request_id} got a wrong token")
            client.received.append(token)
        if self._speaker is not None:
            peer, epoch = self._speaker
            request_id = action.request_id
            if epoch != self.epochs[request_id] or self.owners.get((request_id, epoch)) != peer:
                raise Violation(f"tokens of {request_id} taken from {peer} at old epoch {epoch}")
        if action.finish_reason:
            client.finished = True
            if len(client.received) != client.limit:
                raise Violation(f"{action.request_id} ended after {len(client.received)} tokens")
