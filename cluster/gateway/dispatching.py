"""The gateway's side of the dispatcher: coalesced placement, membership, and doing without."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from cluster.dispatcher.messages import ClusterView, Placement, PlaceRequest, Refusal

logger = logging.getLogger(__name__)

Answer = Placement | Refusal


ASK_AGAIN = 2.0
"""Seconds after which a request that the dispatcher holds is asked for again: its answer may be
lost, or the dispatcher new."""


class Placer(Protocol):
    """Finds instances for requests; ``DispatcherClient``, or what a bench puts there."""

    view: ClusterView

    def on_view(self, callback: Any) -> None:
        """Set who is told each new view."""

    def start(self) -> None:
        """Begin to follow the cluster."""

    async def close(self) -> None:
        """Stop following it."""

    def place(self, request: PlaceRequest) -> asyncio.Future[Answer]:
        """Where a request runs; the future never fails."""

    def finished(self, request_id: str, epoch: int) -> None:
        """A request needs no instance any more."""

    async def call(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        """Await a method of the dispatcher."""


@dataclass(slots=True, eq=False)
class _Question:
    """A request without an answer yet.

    Attributes:
        until: When nobody wants the answer any more, on the loop's clock.
        sent: When the dispatcher was asked last.
    """

    request: PlaceRequest
    answer: asyncio.Future[Answer]
    until: float
    sent: float = 0.0


class DispatcherClient:
    """Asks the dispatcher actor where requests run.

    Calls in flight are coalesced without a timer: what arrives while a call is out goes
    with the next one. The dispatcher answers at once or says that it holds a request; the
    answers to those are fetched by another call. While the dispatcher is away, requests are
    placed by power-of-two-choices on the last view.

    Args:
        gateway_id: The gateway for which it asks.
        resolve: Returns the dispatcher's actor handle; raises ValueError if there is none.
        timeout: Seconds after which an unanswered call counts as the dispatcher being away.
    """

    def __init__(self, gateway_id: str, resolve: Callable[[], Any], timeout: float) -> None:
        self.view = ClusterView(version=-1)
        self.away = False
        self._gateway_id = gateway_id
        self._resolve = resolve
        self._timeout = timeout
        self._view_changed: Callable[[ClusterView], None] = lambda _: None
        self._handle: Any = None
        self._open: dict[tuple[str, int], _Question] = {}
        self._unsent: list[_Question] = []
        self._finished: list[tuple[str, int]] = []
        self._wanted = asyncio.Event()
        self._promised: dict[str, int] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._calls = asyncio.Semaphore(4)
        self._exchanges: set[asyncio.Task[None]] = set()

    def on_view(self, callback: Callable[[ClusterView], None]) -> None:
        """Set who is told each new view."""
        self._view_changed = callback

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._exchange_loop()),
            asyncio.create_task(self._answers_loop()),
            asyncio.create_task(self._ask_again_loop()),
            asyncio.create_task(self._watch_loop()),
        ]

    async def close(self) -> None:
        tasks = [*self._tasks, *self._exchanges]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for question in self._open.values():
            question.answer.cancel()

    def place(self, request: PlaceRequest) -> asyncio.Future[Answer]:
        """Where the request runs; the future never fails."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        question = _Question(request, future, loop.time() + request.time_left)
        self._open[request.request_id, request.epoch] = question
        self._unsent.append(question)
        self._wanted.set()
        return future

    def finished(self, request_id: str, epoch: int) -> None:
        """The request needs no instance any more."""
        self._finished.append((request_id, epoch))
        self._wanted.set()
        self._take(Refusal(request_id, epoch, 404, "this request has ended"))

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
            unsent, self._unsent = self._unsent, []
            done, self._finished = self._finished, []
            questions = [one for one in unsent if not one.answer.done()]
            task = asyncio.create_task(self._exchange(questions, done))
            self._exchanges.add(task)
            task.add_done_callback(self._exchanges.discard)
            task.add_done_callback(lambda _: self._calls.release())

    async def _exchange(self, questions: list[_Question], done: list[tuple[str, int]]) -> None:
        if not questions:
            if done:
                try:
                    await self.call("finished", done)
                except Exception as error:
                    logger.debug("dispatcher did not take %d ends: %s", len(done), error)
            return
        now = asyncio.get_running_loop().time()
        for question in questions:
            question.sent = now
            if question.until < math.inf:
                question.request = replace(question.request, time_left=question.until - now)
        requests = [question.request for question in questions]
        try:
            answers = await self.call("place", requests, done)
            self.away = False
        except Exception as error:
            if not self.away:
                logger.warning("dispatcher is away (%s); placing by the last view", error)
            self.away = True
            self._handle = None
            answers = [self._place_alone(request) for request in requests]
        for answer in answers:
            if answer is not None:
                self._take(answer)

    def _take(self, answer: Answer) -> None:
        question = self._open.pop((answer.request_id, answer.epoch), None)
        if question is not None and not question.answer.done():
            question.answer.set_result(answer)

    async def _answers_loop(self) -> None:
        """Fetch the answers to what the dispatcher holds."""
        while True:
            try:
                for answer in await self.call("answers", self._gateway_id, 1.0):
                    self._take(answer)
            except Exception as error:
                logger.debug("no answers from the dispatcher: %s", error)
                await asyncio.sleep(0.2)

    async def _ask_again_loop(self) -> None:
        while True:
            await asyncio.sleep(ASK_AGAIN / 4)
            oldest = asyncio.get_running_loop().time() - ASK_AGAIN
            waiting = set(self._unsent)
            again = [
                question
                for question in self._open.values()
                if 0.0 < question.sent < oldest and question not in waiting
            ]
            if again:
                self._unsent.extend(again)
                self._wanted.set()

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
            # A dispatcher that was restarted may have forgotten what it said last.
            told = {"overrides": self.view.overrides, "ledger": self.view.ledger}
            try:
                view = await self.call("watch", self.view.version, 1.0, None if known else told)
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
