"""The instance as an actor: a thread with an event loop around one ``InstanceServer``."""

from __future__ import annotations

import asyncio
import concurrent.futures
import faulthandler
import logging
import os
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from instance.config import EngineConfig
from instance.executor import Executor
from instance.heap import freeze_heap
from instance.leases import LedgerUpdate
from instance.load import InstanceInfo, MigrationReport, Role
from instance.model.resolve import Progress
from instance.model.runner import make_executor
from instance.reporting import Reporter
from instance.server import InstanceServer

T = TypeVar("T")
ExecutorFactory = Callable[[EngineConfig, Progress], Executor]
logger = logging.getLogger(__name__)


class InstanceActor:
    """One model replica in a process of its own. Knows nothing of Ray or of the cluster.

    Methods are called from any thread; all state lives on the event loop's thread. When
    the executor fails the process exits, so that the homes replay its requests elsewhere
    and whoever supervises the process starts it anew.

    Args:
        instance_id: Name of the instance.
        config: Settings.
        token: Cluster token.
        host: Address to bind and advertise, or a callable that finds it on this machine.
        reporter: Told of the start and of the load from then on.
        executor: Makes what runs the steps; called on a thread of its own.
    """

    def __init__(
        self,
        instance_id: str,
        config: EngineConfig,
        token: str,
        host: str | Callable[[], str] = "127.0.0.1",
        reporter: Reporter | None = None,
        executor: ExecutorFactory = make_executor,
    ) -> None:
        faulthandler.enable()
        # A step takes the interpreter back from the loop's thread about a thousand times,
        # and must not wait a default interval (5 ms) each time while a migration copies.
        sys.setswitchinterval(0.00005)
        self._instance_id = instance_id
        self._config = config
        self._token = token
        self._host = host
        self._reporter = reporter
        self._make_executor = executor
        self._progress = "starting"
        self._server: InstanceServer | None = None
        self._started: concurrent.futures.Future[InstanceInfo] = concurrent.futures.Future()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="instance-loop", daemon=True
        )
        self._thread.start()
        # Loading starts at once, so that a restarted actor comes back without being asked.
        threading.Thread(target=self._load, name="instance-load", daemon=True).start()

    def _load(self) -> None:
        def progress(stage: str) -> None:
            self._progress = stage

        try:
            executor = self._make_executor(self._config, progress)
            host = self._host if isinstance(self._host, str) else self._host()

            async def serve() -> InstanceInfo:
                self._server = InstanceServer(
                    self._instance_id,
                    uuid.uuid4().hex[:12],
                    executor,
                    self._config,
                    self._token,
                    host,
                    self._reporter,
                    self._die,
                    socket.gethostname(),
                )
                return await self._server.start()

            freeze_heap()  # before the loop has anything to do
            info = asyncio.run_coroutine_threadsafe(serve(), self._loop).result()
            self._progress = "ready"
            self._started.set_result(info)
        except BaseException as error:
            self._progress = f"failed: {error}"
            logger.exception("instance %s did not start", self._instance_id)
            self._started.set_exception(error)

    @staticmethod
    def _die(_: BaseException) -> None:
        os._exit(1)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _ready(self) -> InstanceServer:
        """Wait for the start; never on the loop, which the start itself needs."""
        self._started.result()
        assert self._server is not None
        return self._server

    def start(self) -> InstanceInfo:
        """Wait until the model is loaded and the port is bound; raises what prevented it."""
        return self._started.result()

    def progress(self) -> str:
        """What the start is at: a loading stage, "ready", or "failed: <why>"."""
        return self._progress

    def migrate(self, request_id: str, destination: InstanceInfo, reason: str) -> MigrationReport:
        """Move a request that runs or waits here; returns when the attempt has ended."""
        return self._run(self._ready().migrate(request_id, destination, reason))

    def drain(self, on: bool) -> None:
        """Say in the reports that this instance is draining, or no longer."""
        server = self._ready()

        async def set_draining() -> None:
            server.reports.draining = on
            server.reports.soon()

        self._run(set_draining())

    def set_role(self, role: Role) -> None:
        """Say in the reports what this instance is for."""
        server = self._ready()

        async def set_role() -> None:
            server.reports.role = role
            server.reports.soon()

        self._run(set_role())

    def tell_prefixes(self) -> None:
        """Report all that the prefix cache holds."""
        server = self._ready()

        async def tell() -> None:
            server.reports.tell_prefixes()

        self._run(tell())

    def take_ledger(self, incarnation: str, update: LedgerUpdate) -> None:
        """Take over what is new in the cluster's ledger of service."""
        server = self._ready()

        async def take() -> None:
            server.take_ledger(incarnation, update)

        self._run(take())

    def copy_ledger(self) -> tuple[str, LedgerUpdate]:
        """The incarnation, and the ledger that it works with."""
        server = self._ready()

        async def copy() -> tuple[str, LedgerUpdate]:
            return server.incarnation, server.counters.copy()

        return self._run(copy())

    def check(self) -> dict[str, Any]:
        """Integrity and use of the block pool; raises IntegrityError if it is broken."""
        server = self._ready()

        async def check() -> dict[str, Any]:
            return server.check()

        return self._run(check())

    def stop(self) -> None:
        """Close streams, port and executor; the actor can only be discarded afterwards."""
        if self._server is not None:
            self._run(self._server.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
