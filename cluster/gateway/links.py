"""The gateway's streams to instances: connect, reconnect, tell when one is gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Protocol

import grpc
import grpc.aio

from instance import wire
from instance.load import InstanceInfo
from protos import generate_pb2 as pb
from protos import generate_pb2_grpc

logger = logging.getLogger(__name__)


class LinkListener(Protocol):
    """What a link tells its owner."""

    def connected(self, link: InstanceLink) -> None:
        """The stream is up and the instance is the expected incarnation."""

    def received(self, link: InstanceLink, message: pb.ToGateway) -> None:
        """A message other than the welcome."""

    def gone(self, link: InstanceLink) -> None:
        """The instance is dead, out of reach for too long, or has been replaced."""


class InstanceLink:
    """One bidirectional stream to one incarnation of an instance, reopened when it breaks.

    A refused connection means that the process is dead; any other break is retried for
    ``patience`` seconds before the instance counts as gone.
    """

    def __init__(
        self,
        info: InstanceInfo,
        gateway_id: str,
        token: str,
        listener: LinkListener,
        patience: float,
        clock: Callable[[], float],
    ) -> None:
        self.info = info
        self.up = False
        self.dead = False
        self._gateway_id = gateway_id
        self._token = token
        self._listener = listener
        self._patience = patience
        self._clock = clock
        self._outbox: list[pb.ToInstance] = []
        self._ready = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    def send(self, message: pb.ToInstance) -> None:
        """Queue a message; dropped while the stream is down (the holdings mend that)."""
        if self.up:
            self._outbox.append(message)
            self._ready.set()

    async def close(self) -> None:
        self.dead = True
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        channel = grpc.aio.insecure_channel(self.info.address, options=wire.CHANNEL_OPTIONS)
        try:
            lost_at: float | None = None
            while True:
                refused = await self._serve_stream(channel)
                now = self._clock()
                if self.up:
                    self.up = False
                    lost_at = now
                elif lost_at is None:
                    lost_at = now
                if refused or now - lost_at > self._patience:
                    break
                await asyncio.sleep(0.05)
        finally:
            await channel.close(None)
        self.dead = True
        self._listener.gone(self)

    async def _serve_stream(self, channel: grpc.aio.Channel) -> bool:
        """One stream from opening to its end; true if the instance is certainly dead."""
        stub = generate_pb2_grpc.GenerateStub(channel)
        call = stub.Connect(metadata=wire.credentials(self._token), wait_for_ready=False)
        writer: asyncio.Task[None] | None = None
        try:
            await call.write(
                pb.ToInstance(
                    hello=pb.Hello(protocol=wire.PROTOCOL_VERSION, gateway_id=self._gateway_id)
                )
            )
            async with asyncio.timeout(self._patience):
                welcome = await call.read()
            if welcome is wire.END:
                return await self._is_fatal(call)
            if welcome.welcome.incarnation != self.info.incarnation:
                return True
            self._outbox.clear()
            self.up = True
            self._listener.connected(self)
            writer = asyncio.create_task(self._write(call))
            while (message := await call.read()) is not wire.END:
                self._listener.received(self, message)
            return await self._is_fatal(call)
        except grpc.aio.AioRpcError as error:
            return _fatal(error.code(), error.details() or "", self.info)
        except (TimeoutError, asyncio.InvalidStateError):
            return False
        finally:
            if writer is not None:
                writer.cancel()
            call.cancel()

    async def _is_fatal(self, call: grpc.aio.StreamStreamCall[pb.ToInstance, pb.ToGateway]) -> bool:
        return _fatal(await call.code(), await call.details() or "", self.info)

    async def _write(self, call: grpc.aio.StreamStreamCall[pb.ToInstance, pb.ToGateway]) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                messages, self._outbox = self._outbox, []
                for message in messages:
                    await call.write(message)
                if not self._outbox:
                    self._ready.clear()
                    await self._ready.wait()


def _fatal(code: grpc.StatusCode, details: str, info: InstanceInfo) -> bool:
    """A dead process refuses connections; a wrong token or protocol will not mend itself."""
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.FAILED_PRECONDITION):
        logger.error("instance %s refuses this gateway: %s", info.instance_id, details)
        return True
    return code is grpc.StatusCode.UNAVAILABLE and "refused" in details.lower()
