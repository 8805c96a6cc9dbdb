"""Sends a workload to a server, each request at its time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.replay.client import Answer, CompletionClient, ServerError
from cluster.replay.results import RequestResult
from cluster.simulation.workloads.records import WorkloadRequest, prompt_ids


@dataclass(frozen=True, slots=True)
class ReplaySettings:
    """How a workload is replayed.

    Attributes:
        model: Name of the model.
        vocabulary: Token ids of which prompts are made.
        seed: Of the prompts' contents.
        keys: API key by tenant; tenants without one use the client's own.
        max_concurrency: Requests under way at most; 0 for any number. A limit delays what is
            due: the load is then no longer open-loop.
        sampling: Further fields of every request.
    """

    model: str
    vocabulary: Sequence[int]
    seed: int = 0
    keys: Mapping[str, str] = field(default_factory=dict)
    max_concurrency: int = 0
    sampling: Mapping[str, Any] = field(default_factory=dict)


class Replay:
    """One replay. A turn of a session is due its think time after the answer to the one
    before, and its prompt holds the answers that were really given.

    Args:
        client: Its way to the server.
        requests: The workload.
        settings: How.

    Attributes:
        results: Requests that were sent, in that order.
        finished: How many of them have ended.
        seconds: Duration, once it has ended.
        model: Name of the model.
    """

    def __init__(
        self,
        client: CompletionClient,
        requests: Sequence[WorkloadRequest],
        settings: ReplaySettings,
    ) -> None:
        self.results: list[RequestResult] = []
        self.finished = 0
        self.seconds = 0.0
        self.model = settings.model
        self._client = client
        self._requests = requests
        self._settings = settings
        self._limit = asyncio.Semaphore(settings.max_concurrency or len(requests) or 1)
        self._answers: dict[str, dict[int, list[int]]] = {}
        # By session and turn: when it ended, or None if what follows cannot be sent.
        self._ends: dict[tuple[str, int], asyncio.Future[float | None]] = {}
        self._repeated = {
            (request.session, span.turn)
            for request in requests
            for span in request.prompt
            if span.turn >= 0
        }
        self._began = 0.0

    async def run(self, told: Callable[[], None] = lambda: None) -> None:
        """Replay everything. If cancelled, what is under way is given up and counts as failed.

        Args:
            told: Called after each request that ends.
        """
        loop = asyncio.get_running_loop()
        for request in self._requests:
            if request.session:
                self._ends[request.session, request.turn] = loop.create_future()
        self._began = time.monotonic()
        try:
            async with asyncio.TaskGroup() as tasks:
                for number, request in enumerate(self._requests):
                    if request.think is None:
                        # No task for what is far away: a workload may be long.
                        await self._sleep_until(request.arrival)
                        tasks.create_task(self._send(number, request, request.arrival, told))
                    else:
                        tasks.create_task(self._follow(number, request, request.think, told))
        finally:
            self.seconds = time.monotonic() - self._began

    async def _sleep_until(self, due: float) -> None:
        if (left := self._began + due - time.monotonic()) > 0:
            await asyncio.sleep(left)

    async def _follow(
        self, number: int, request: WorkloadRequest, think: float, told: Callable[[], None]
    ) -> None:
        end = await self._ends[request.session, request.turn - 1]
        if end is None:
            # There is no answer to go on from.
            self._ends[request.session, request.turn].set_result(None)
            return
        await self._sleep_until(end + think)
        await self._send(number, request, end + think, told)

    async def _send(
        self, number: int, request: WorkloadRequest, due: float, told: Callable[[], None]
    ) -> None:
        settings = self._settings
        earlier = self._answers.get(request.session, {})
        prompt = prompt_ids(request, settings.vocabulary, settings.seed, earlier)
        headers = {"x-drover-class": request.request_class.name.lower()}
        if request.session:
            headers["x-session-id"] = f"{settings.seed}-{request.session}"
        async with self._limit:
            answer = Answer(time.monotonic())
            result = RequestResult(
                number,
                request.tenant,
                request.group,
                request.request_class.name.lower(),
                request.session,
                request.turn,
                due,
                prompt_tokens=len(prompt),
            )
            self.results.append(result)
            try:
                await self._client.complete(
                    answer,
                    settings.model,
                    prompt,
                    request.output_tokens,
                    settings.keys.get(request.tenant),
                    headers,
                    **settings.sampling,
                )
            except ServerError as error:
                result.failure, result.detail = error.kind, str(error)
            except asyncio.CancelledError:
                result.failure, result.detail = "interrupted", "the replay was interrupted"
                raise
            finally:
                self._note(result, answer)
        await self._ended(request, result, answer)
        told()

    def _note(self, result: RequestResult, answer: Answer) -> None:
        usage = answer.usage
        result.sent = answer.sent - self._began
        result.ended = (answer.ended or time.monotonic()) - self._began
        result.arrivals = [arrival - self._began for arrival in answer.arrivals]
        result.prompt_tokens = usage.get("prompt_tokens", result.prompt_tokens)
        result.output_tokens = usage.get("completion_tokens", len(answer.arrivals))
        details = usage.get("prompt_tokens_details") or {}
        result.cached_tokens = details.get("cached_tokens") or 0
        self.finished += 1

    async def _ended(self, request: WorkloadRequest, result: RequestResult, answer: Answer) -> None:
        key = request.session, request.turn
        if not request.session or self._ends[key].done():
            return
        end: float | None = None if result.failure else result.ended
        if end is not None and key in self._repeated:
            try:
                ids = await self._client.tokenize(self._settings.model, answer.text)
                self._answers.setdefault(request.session, {})[request.turn] = ids
            except ServerError as error:
                result.failure, result.detail = error.kind, str(error)
                end = None
        self._ends[key].set_result(end)


async def replay_greedily(
    url: str, key: str, requests: Sequence[WorkloadRequest], seed: int
) -> Replay:
    """Replay a workload on the first model of a server, each token the likeliest.

    Args:
        url: Of the server.
        key: API key; "" for none.
        requests: The workload.
        seed: Of the prompts' contents.
    """
    async with CompletionClient(url, key) as client:
        model, _ = await client.model()
        vocabulary = await client.vocabulary(model)
        settings = ReplaySettings(model, vocabulary, seed, sampling={"temperature": 0.0})
        replay = Replay(client, requests, settings)
        await replay.run()
    return replay
