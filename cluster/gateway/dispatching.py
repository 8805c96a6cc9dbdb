"""The gateway's side of the dispatcher: coalesced placement, membership, and doing without."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from typing import Any

from cluster.dispatcher.messages import ClusterView, Placement, PlaceRequest, Refusal

logger = logging.getLogger(__name__)

Answer = Placement | Refusal


class DispatcherClient:
    """Asks the dispatcher actor where requests run.

    Calls in flight are coalesced without a timer: what arrives while a call is out goes
    with the next one. While the dispatcher is away, requests are placed by
    power-of-two-choices on the last view (DESIGN, section 7).

    Args:
        resolve: Returns the dispatcher's actor handle; raises ValueError if there is none.
        timeout: Seconds after which an unanswered call counts as the dispatcher being away.
    """

    def __init__(self, resolve: Callable[[], Any], timeout: float) -> None:
        self.view = ClusterView(version=-1)
        self.away = False
        self._resolve = resolve
        self._timeout = timeout
        self._view_changed: Callable[[ClusterView], None] = lambda _: None
        self._handle: Any = None
        self._waiting: list[tuple[PlaceRequest, asyncio.Future[Answer]]] = []
        self._finished: list[tuple[str, int]] = []
        self._wanted = asyncio.Event()
        self._promised: dict[str, int] = {}
        self._tasks: list[asyncio.Task[None]] = []
        # A call may be held while no instance is ready, so a few are out at a time.
        self._calls = asyncio.Semaphore(4)
        self._exchanges: set[asyncio.Task[None]] = set()

    def on_view(self, callback: Callable[[ClusterView], None]) -> None:
        """Set who is told each new view."""
        self._view_changed = callback

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._exchange_loop()),
            asyncio.create_task(self._watch_loop()),
        ]

    async def close(self) -> None:
        tasks = [*self._tasks, *self._exchanges]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for _, future in self._waiting:
            future.cancel()

    def place(self, request: PlaceRequest) -> asyncio.Future[Answer]:
        """Where the request runs; the future never fails."""
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        self._wanted.set()
        return future

    def finished(self, request_id: str, epoch: int) -> None:
        """The request needs no instance any more."""
        self._finished.append((request_id, epoch))
        self._wanted.set()

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        """Await one method of the dispatcher actor; raises what it raises, or TimeoutError."""
        if self._handle is None:
            self._handle = self._resolve()
        reference = getattr(self._handle, method).remote(*args)
        # Not wait_for: before Python 3.12 it may swallow the cancellation of a loop.
        async with asyncio.timeout(timeout or self._timeout):
            return await asyncio.wrap_future(reference.future())

    async def _exchange_loop(self) -> None:
        while True:
            await self._wanted.wait()
            await self._calls.acquire()
            self._wanted.clear()
            waiting, self._waiting = self._waiting, []
            done, self._finished = self._finished, []
            # A batch is answered together, and a replay may be held until an instance is
            # back: new requests must not wait for that.
            new = [one for one in waiting if one[0].epoch == 1]
            replays = [one for one in waiting if one[0].epoch > 1]
            if replays:
                self._spawn(self._exchange(replays, []))
            self._spawn(self._exchange(new, done)).add_done_callback(
                lambda _: self._calls.release()
            )

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._exchanges.add(task)
        task.add_done_callback(self._exchanges.discard)
        return task

    async def _exchange(
        self,
        batch: list[tuple[PlaceRequest, asyncio.Future[Answer]]],
        done: list[tuple[str, int]],
    ) -> None:
        if done:
            try:
                await self.call("finished", done)
            except Exception as error:
                logger.debug("dispatcher did not take %d ends: %s", len(done), error)
        if not batch:
            return
        try:
            answers = await self.call("place", [request for request, _ in batch])
            self.away = False
        except Exception as error:
            if not self.away:
                logger.warning("dispatcher is away (%s); placing by the last view", error)
            self.away = True
            self._handle = None
            answers = [self._place_alone(request) for request, _ in batch]
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():
                future.set_result(answer)

    def _place_alone(self, request: PlaceRequest) -> Answer:
        """Power of two choices on the last view plus what was placed since."""
        usable = [
            view
            for view in self.view.instances
            if view.state == "ready" and view.info.instance_id not in request.avoid
        ]
        if not usable:
            return Refusal(
                request.request_id, request.epoch, 503, "no instance is known to be ready"
            )
        pair = random.sample(usable, min(2, len(usable)))
        best = min(
            pair,
            key=lambda view: (
                view.running + view.waiting + self._promised.get(view.info.instance_id, 0)
            ),
        )
        self._promised[best.info.instance_id] = self._promised.get(best.info.instance_id, 0) + 1
        return Placement(
            request.request_id, request.epoch, best.info.instance_id, best.info.incarnation
        )

    async def _watch_loop(self) -> None:
        known = False
        while True:
            # A dispatcher that was restarted may have forgotten what operators had set.
            overrides = None if known else self.view.overrides
            try:
                view = await self.call("watch", self.view.version, 1.0, overrides)
                known = True
            except Exception as error:
                logger.debug("no view from the dispatcher: %s", error)
                known = False
                self._handle = None
                await asyncio.sleep(0.2)
                continue
            self.away = False
            self._promised.clear()
            self.view = view
            self._view_changed(view)
