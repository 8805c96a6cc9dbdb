"""Control streams from this instance to the destinations of its migrations."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import grpc.aio

from instance import wire
from instance.load import InstanceInfo
from protos import migration_pb2 as pb
from protos import migration_pb2_grpc


class PeerLink:
    """The control stream to one incarnation of another instance.

    It is opened with the first attempt and closed for good when it breaks: every attempt
    on it hears of the loss, and the next attempt opens a new one.
    """

    def __init__(
        self,
        info: InstanceInfo,
        token: str,
        greeting: pb.Peer,
        received: Callable[[pb.ToSource], None],
        lost: Callable[[PeerLink], None],
    ) -> None:
        self.info = info
        self.broken = False
        self.metadata = wire.credentials(token)
        self._channel = grpc.aio.insecure_channel(info.address, options=wire.CHANNEL_OPTIONS)
        self.stub = migration_pb2_grpc.MigrationStub(self._channel)
        self._received = received
        self._lost = lost
        self._outbox: asyncio.Queue[pb.ToDestination] = asyncio.Queue()
        self._outbox.put_nowait(pb.ToDestination(hello=greeting))
        self._task = asyncio.create_task(self._run())

    def send(self, message: pb.ToDestination) -> None:
        """Queue a message; dropped once the stream is broken."""
        if not self.broken:
            self._outbox.put_nowait(message)

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        call = self.stub.Control(metadata=self.metadata)
        writer = asyncio.create_task(self._write(call))
        try:
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                while True:
                    message = await call.read()
                    if message is wire.END:
                        break
                    if (
                        message.WhichOneof("message") == "hello"
                        and message.hello.incarnation != self.info.incarnation
                    ):
                        break
                    self._received(message)
        finally:
            self.broken = True
            writer.cancel()
            call.cancel()
            self._lost(self)
            await self._channel.close(None)

    async def _write(self, call: grpc.aio.StreamStreamCall[pb.ToDestination, pb.ToSource]) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await call.write(await self._outbox.get())
