"""Carries requests to instances and their tokens back: the shell around ``home.Home``."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Iterable
from typing import Any

from cluster.dispatcher.messages import ClusterView, Placement, PlaceRequest
from cluster.gateway.dispatching import Placer
from cluster.gateway.home import Home
from cluster.gateway.home_actions import (
    Deliver,
    Held,
    HomeAction,
    Peer,
    Place,
    SendAsk,
    SendCancel,
    SendClaimReply,
    SendSubmit,
)
from cluster.gateway.links import InstanceLink
from cluster.gateway.served import ServedService
from cluster.gateway.stream import RequestFailed, RequestStream
from instance import wire
from instance.kv.prefix import with_adapter
from instance.kv.prefix_events import prompt_keys
from instance.load import InstanceInfo
from instance.request import FinishReason, Request
from protos import generate_pb2 as pb

logger = logging.getLogger(__name__)

_FINISH_REASONS = {reason.value: reason for reason in FinishReason}
"""What an enumeration's own lookup would find, at a fifth of its cost: one per token."""


class Router:
    """One gateway's requests: placed, submitted, followed wherever they move.

    Args:
        home_id: Id of this gateway process, new at every start.
        token: Cluster token.
        placer: Finds instances.
        connect_timeout: Seconds without a stream after which an instance counts as gone.
        placement_timeout: Seconds that a request started already may wait for a new
            instance before it ends with an error.
    """

    def __init__(
        self,
        home_id: str,
        token: str,
        placer: Placer,
        connect_timeout: float = 2.0,
        placement_timeout: float = 30.0,
    ) -> None:
        self.home_id = home_id
        self.home = Home()
        self._token = token
        self._placer = placer
        self._connect_timeout = connect_timeout
        self._placement_timeout = placement_timeout
        self._streams: dict[str, RequestStream] = {}
        self._links: dict[Peer, InstanceLink] = {}
        self._infos: dict[Peer, InstanceInfo] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._served = ServedService()
        self._closing = False

    @property
    def view(self) -> ClusterView:
        """The cluster as the dispatcher last told it."""
        return self._placer.view

    @property
    def active(self) -> int:
        """Open requests."""
        return len(self._streams)

    def describe_requests(self) -> list[dict[str, Any]]:
        """The open requests of this gateway, ready for JSON."""
        now = time.monotonic()
        return [
            {
                "request_id": stream.request_id,
                "gateway": self.home_id,
                "instance": stream.holder,
                "epoch": stream.epoch,
                "migrations": stream.migrations,
                "replays": stream.replays,
                "tenant": stream.request.tenant,
                "prompt_tokens": len(stream.request.prompt),
                "output_tokens": stream.num_output,
                "seconds": now - stream.started,
            }
            for stream in self._streams.values()
        ]

    async def start(self) -> None:
        """Follow the cluster and connect to its instances."""
        self._placer.on_view(self._view_changed)
        self._placer.start()

    async def wait_connected(self, count: int) -> None:
        """Wait until streams to ``count`` instances are up."""
        while sum(link.up for link in self._links.values()) < count:
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        """Cancel what runs and close every stream."""
        self._closing = True
        for stream in list(self._streams.values()):
            stream.fail(RequestFailed(503, "the gateway is stopping", retry_after=1.0))
            self._close(stream)
        await asyncio.sleep(0)  # lets the cancels leave
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._placer.close()
        await asyncio.gather(*(link.close() for link in list(self._links.values())))

    async def dispatcher_call(self, method: str, *args: Any, timeout: float = 60.0) -> Any:
        """Await a method of the dispatcher; raises RequestFailed(503) when it is away."""
        try:
            return await self._placer.call(method, *args, timeout=timeout)
        except (TimeoutError, ConnectionError) as error:
            raise RequestFailed(503, f"the dispatcher is away: {error}", retry_after=2.0) from None

    # ---- requests

    def submit(self, request: Request, deadline: float = math.inf) -> RequestStream:
        """Start a request; raises ValueError if its id is in use.

        Args:
            deadline: When its client gives up, on the event loop's clock.
        """
        stream = RequestStream(self.home, self.cancel, request, deadline)
        actions = self.home.add(request.request_id)
        self._streams[request.request_id] = stream
        self._execute(actions)
        return stream

    def cancel(self, stream: RequestStream) -> None:
        """The client needs no more of this request."""
        if self._streams.get(stream.request_id) is stream:
            self._close(stream)
            stream.end()

    def replay(self, request_id: str) -> None:
        """Start a request again elsewhere, as if its instance had lost it."""
        owned = self.home.requests[request_id]
        if owned.holder is not None:
            self._execute(self.home.lost(owned.holder, request_id, owned.epoch))

    def _close(self, stream: RequestStream) -> None:
        epoch = stream.epoch
        self._execute(self.home.close(stream.request_id))
        self._forget(stream, epoch)

    def _forget(self, stream: RequestStream, epoch: int) -> None:
        if self._streams.pop(stream.request_id, None) is not None:
            self._placer.finished(stream.request_id, epoch)

    def _fail(self, stream: RequestStream, failure: RequestFailed) -> None:
        stream.fail(failure)
        self._close(stream)

    # ---- placement

    def _place(self, action: Place) -> None:
        stream = self._streams[action.request_id]
        stream.epoch = action.epoch
        if action.epoch > 1:
            stream.replays += 1
            if stream.stalled_since is None:
                stream.stalled_since = time.monotonic()
            logger.info("request %s is replayed under epoch %d", action.request_id, action.epoch)
        self._spawn(self._find_instance(stream, action))

    async def _find_instance(self, stream: RequestStream, action: Place) -> None:
        request = stream.request
        delay = 0.02
        if stream.stalled_since is not None:
            # Instances that fail one after the other must not be asked in a hot loop.
            stream.placements_failed += 1
            await asyncio.sleep(min(0.5, delay * (stream.placements_failed - 1)))
        while self._streams.get(action.request_id) is stream and stream.epoch == action.epoch:
            answer = await self._placer.place(
                PlaceRequest(
                    request_id=action.request_id,
                    epoch=action.epoch,
                    gateway_id=self.home_id,
                    tenant=request.tenant,
                    request_class=request.request_class,
                    num_tokens=len(request.prompt) + stream.num_output,
                    max_tokens=request.params.max_tokens,
                    arrival=request.arrival,
                    model=request.model,
                    avoid=action.avoid,
                    prefix=self._prefix(stream),
                    time_left=stream.deadline - asyncio.get_running_loop().time(),
                )
            )
            if isinstance(answer, Placement):
                peer = Peer(answer.instance_id, answer.incarnation)
                self._expect(peer)
                self._execute(self.home.placed(action.request_id, action.epoch, peer))
                return
            waited = time.monotonic() - (stream.stalled_since or 0.0)
            if stream.stalled_since is None or waited > self._placement_timeout:
                if self._streams.get(action.request_id) is stream:
                    self._fail(
                        stream,
                        RequestFailed(
                            answer.status,
                            answer.reason,
                            code=answer.code or None,
                            retry_after=answer.retry_after if answer.status in (429, 503) else None,
                        ),
                    )
                return
            await asyncio.sleep(delay)
            delay = min(2 * delay, 0.5)

    def _prefix(self, stream: RequestStream) -> bytes:
        """Keys of the prompt's leading blocks, as the instances of its model know them."""
        if stream.prefix is None:
            request = stream.request
            models = (one.info.model for one in self.view.instances)
            model = next((m for m in models if request.model in (m.name, "")), None)
            if model is None:
                return b""
            salt = with_adapter(model.kv_salt, request.adapter)
            stream.prefix = prompt_keys(request.prompt, model.block_size, salt)
        return stream.prefix

    def _expect(self, peer: Peer) -> None:
        """A request goes to this peer: unless a stream comes up in time, it is gone."""
        link = self._links.get(peer)
        if link is None and peer in self._infos:
            self._connect(self._infos[peer])
        elif link is None:
            self._spawn(self._await_link(peer))

    async def _await_link(self, peer: Peer) -> None:
        # The placement overtook the view that introduces the instance.
        await asyncio.sleep(self._connect_timeout)
        if peer not in self._links:
            self._execute(self.home.gone(peer))

    # ---- links

    def _view_changed(self, view: ClusterView) -> None:
        self._infos = {
            Peer(one.info.instance_id, one.info.incarnation): one.info for one in view.instances
        }
        for peer, info in self._infos.items():
            if peer not in self._links:
                self._connect(info)

    def _connect(self, info: InstanceInfo) -> None:
        if not self._closing:
            self._links[_peer(info)] = InstanceLink(
                info, self.home_id, self._token, self, self._connect_timeout, time.monotonic
            )

    def connected(self, link: InstanceLink) -> None:
        """A stream is up."""
        self.home.connected(_peer(link.info))

    def gone(self, link: InstanceLink) -> None:
        """An instance is dead, replaced or out of reach."""
        peer = _peer(link.info)
        if self._links.get(peer) is link:
            del self._links[peer]
        if not self._closing:
            logger.warning("instance %s (%s) is gone", *peer)
            self._execute(self.home.gone(peer))
            self._spawn(self._tell_served(peer))

    async def _tell_served(self, peer: Peer) -> None:
        """The instance may not have reported all that it did."""
        charged = self._served.of(peer)
        if not charged:
            return
        try:
            await self._placer.call("served", self.home_id, *peer, charged)
            if peer not in self._infos and peer not in self._links:
                self._served.forget(peer)
        except Exception as error:
            logger.debug("dispatcher did not hear what %s (%s) served: %s", *peer, error)

    def received(self, link: InstanceLink, message: pb.ToGateway) -> None:
        """Feed what an instance says to the home."""
        peer = _peer(link.info)
        kind = message.WhichOneof("message")
        if kind == "frame":
            take, execute = self.home.tokens, self._execute
            for part in message.frame.tokens:
                actions = take(
                    peer,
                    part.request_id,
                    part.epoch,
                    part.index,
                    part.tokens,
                    _FINISH_REASONS[part.finish_reason],
                    part.message,
                    part.cached_tokens,
                    wire.logprobs_from_wire(part.logprobs) if part.logprobs else (),
                )
                execute(actions, peer)
            link.send(pb.ToInstance(ack=pb.Ack(frame=message.frame.number)))
        elif kind == "claim":
            claim = message.claim
            self._execute(
                self.home.claim(
                    peer,
                    claim.request_id,
                    claim.epoch,
                    claim.attempt,
                    claim.index,
                    claim.tokens,
                    wire.logprobs_from_wire(claim.logprobs),
                )
            )
            stream = self._streams.get(claim.request_id)
            if stream is not None:
                owned = self.home.requests[claim.request_id]
                stream.epoch, stream.migrations = owned.epoch, owned.moves
        elif kind == "holdings":
            held = [
                Held(one.request_id, one.epoch, one.state, one.next_index, one.charged.prompt)
                for one in message.holdings.holdings
            ]
            self._execute(self.home.holdings(peer, message.holdings.submits, held))
        elif kind == "lost":
            self._execute(self.home.lost(peer, message.lost.request_id, message.lost.epoch))

    # ---- actions

    def _execute(self, actions: Iterable[HomeAction], producer: Peer | None = None) -> None:
        for action in actions:
            match action:
                case Deliver():
                    stream = self._streams[action.request_id]
                    if producer is not None:
                        request = stream.request
                        fresh = 0 if action.index else len(request.prompt) - action.cached_tokens
                        self._served.note(producer, request.account, fresh, len(action.tokens))
                    stream.deliver(action, None if producer is None else producer.instance_id)
                    if action.finish_reason:
                        self._forget(stream, stream.epoch)
                case SendSubmit(peer, request_id, epoch):
                    stream = self._streams[request_id]
                    owned = self.home.requests[request_id]
                    submit = wire.submit_to_wire(
                        stream.request,
                        epoch,
                        owned.output,
                        peer.incarnation,
                        owned.charged_prompt,
                    )
                    self._send(peer, pb.ToInstance(submit=submit))
                case SendCancel(peer, request_id, epoch):
                    self._send(
                        peer, pb.ToInstance(cancel=pb.Cancel(request_id=request_id, epoch=epoch))
                    )
                case SendClaimReply():
                    self._send(
                        action.peer,
                        pb.ToInstance(
                            claim_reply=pb.ClaimReply(
                                request_id=action.request_id,
                                epoch=action.epoch,
                                attempt=action.attempt,
                                outcome=wire.enum_value(action.outcome),
                                new_epoch=action.new_epoch,
                                next_index=action.next_index,
                            )
                        ),
                    )
                case SendAsk(peer, request_id, epoch, index):
                    self._send(
                        peer,
                        pb.ToInstance(ask=pb.Ask(request_id=request_id, epoch=epoch, index=index)),
                    )
                case Place():
                    self._place(action)

    def _send(self, peer: Peer, message: pb.ToInstance) -> None:
        link = self._links.get(peer)
        if link is not None:
            link.send(message)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _peer(info: InstanceInfo) -> Peer:
    return Peer(info.instance_id, info.incarnation)
