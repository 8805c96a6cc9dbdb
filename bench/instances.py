"""Instances in processes of their own, without Ray, and a gateway's router in this one."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from cluster.dispatcher.messages import ClusterView, InstanceView, Placement, PlaceRequest, Refusal
from instance.config import EngineConfig
from instance.load import InstanceInfo, MigrationReport

if TYPE_CHECKING:  # it loads torch, which has to wait for the number of threads
    from instance.actor import ExecutorFactory

TOKEN = "bench"


def _serve(
    pipe: Connection,
    instance_id: str,
    config: EngineConfig,
    executor: ExecutorFactory | None = None,
) -> None:
    os.environ["OMP_NUM_THREADS"] = str(config.num_threads)
    from instance.actor import InstanceActor

    made: dict[str, Any] = {} if executor is None else {"executor": executor}
    actor = InstanceActor(instance_id, config, TOKEN, **made)

    def answer(number: int, method: str, args: tuple[Any, ...]) -> None:
        try:
            result: Any = getattr(actor, method)(*args)
        except Exception as error:
            result = error
        with lock:
            pipe.send((number, result))

    lock = threading.Lock()
    while True:
        try:
            number, method, args = pipe.recv()
        except EOFError:
            break
        threading.Thread(target=answer, args=(number, method, args), daemon=True).start()
    os._exit(0)


class InstanceProcess:
    """An ``InstanceActor`` in a child process; its methods are awaited.

    ``executor``, which must pickle, makes what runs the steps; None runs the model.
    """

    def __init__(
        self, instance_id: str, config: EngineConfig, executor: ExecutorFactory | None = None
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(child, instance_id, config, executor), daemon=True
        )
        self.process.start()
        child.close()
        self._loop = asyncio.get_running_loop()
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._number = 0
        self.info: InstanceInfo | None = None
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        while True:
            try:
                number, result = self._pipe.recv()
            except (EOFError, OSError):
                return
            self._loop.call_soon_threadsafe(self._resolve, number, result)

    def _resolve(self, number: int, result: Any) -> None:
        future = self._calls.pop(number)
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)

    def call(self, method: str, *args: Any) -> Awaitable[Any]:
        self._number += 1
        future = self._loop.create_future()
        self._calls[self._number] = future
        self._pipe.send((self._number, method, args))
        return future

    async def start(self) -> InstanceInfo:
        self.info = await self.call("start")
        assert self.info is not None
        return self.info

    async def migrate(self, request_id: str, to: InstanceProcess, reason: str) -> MigrationReport:
        report = await self.call("migrate", request_id, to.info, reason)
        assert isinstance(report, MigrationReport)
        return report

    def close(self) -> None:
        self._pipe.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()


class FixedPlacer:
    """Stands where the dispatcher client stands and places where it is told."""

    def __init__(self, choose: Callable[[PlaceRequest], str]) -> None:
        self.choose = choose
        self.view = ClusterView(version=0)
        self._view_changed: Callable[[ClusterView], None] = lambda _: None

    def start(self) -> None:
        self._view_changed(self.view)

    async def close(self) -> None:
        pass

    def on_view(self, callback: Callable[[ClusterView], None]) -> None:
        self._view_changed = callback

    def set_instances(self, infos: list[InstanceInfo]) -> None:
        self.view = ClusterView(
            self.view.version + 1,
            tuple(InstanceView(info, "ready", 0.0, 0.0, 0, 0, 0, 0.0) for info in infos),
        )
        self._view_changed(self.view)

    def place(self, request: PlaceRequest) -> asyncio.Future[Placement | Refusal]:
        future: asyncio.Future[Placement | Refusal] = asyncio.get_running_loop().create_future()
        chosen = self.choose(request)
        info = next(v.info for v in self.view.instances if v.info.instance_id == chosen)
        future.set_result(Placement(request.request_id, request.epoch, chosen, info.incarnation))
        return future

    def finished(self, request_id: str, epoch: int) -> None:
        pass

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        raise RuntimeError("there is no dispatcher here")
