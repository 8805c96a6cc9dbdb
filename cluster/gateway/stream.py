"""One request as the gateway reads it: its tokens, its moves, and how it ends."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cluster.gateway.home import Home
from cluster.gateway.home_actions import Deliver
from instance.request import FinishReason, Request, TokenLogprobs


class RequestFailed(Exception):
    """A request that cannot go on, in terms of an HTTP answer.

    Attributes:
        status: HTTP status.
        message: For people.
        type: OpenAI's kind of error; None for the one that fits the status.
        code: For programs.
        retry_after: Seconds after which trying again makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.code = code
        self.retry_after = retry_after


class Delta(NamedTuple):
    """New output tokens; ``finish_reason`` is NOT_FINISHED until the last one.

    ``logprobs`` has one for each token where the request asks for them, else none.
    """

    tokens: list[int]
    finish_reason: FinishReason
    message: str
    cached_tokens: int
    logprobs: Sequence[TokenLogprobs] = ()


class RequestStream:
    """The output of one request: an async iterator of ``Delta``; raises RequestFailed.

    Tokens that came since the last read are one delta, so a slow reader costs no more.

    Args:
        home: Knows who holds the request.
        cancel: Called when the reader gives the request up.
        request: What was asked.
        deadline: When its client gives up, on the event loop's clock.

    Attributes:
        request: What was asked.
        deadline: When its client gives up, on the event loop's clock.
        producer: Instance whose tokens came last; None before the first.
        epoch: Present ownership number.
        migrations: Moves so far.
        replays: Times the request was started again elsewhere.
        pauses: Seconds between tokens at moves, until somebody takes them out.
        stalls: The same at replays.
        prefix: Keys of the prompt's leading blocks, once they were made.
    """

    def __init__(
        self,
        home: Home,
        cancel: Callable[[RequestStream], None],
        request: Request,
        deadline: float = math.inf,
    ) -> None:
        self.request = request
        self.deadline = deadline
        self.producer: str | None = None
        self.epoch = 1
        self.migrations = 0
        self.replays = 0
        self.prefix: bytes | None = None
        self.num_output = 0
        self.started = time.monotonic()
        self.stalled_since: float | None = None
        self.placements_failed = 0
        self.pauses: list[float] = []
        self.stalls: list[float] = []
        self._delivered = 0.0
        self._home = home
        self._cancel = cancel
        self._holder: str | None = None
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._cached = 0
        self._reason = FinishReason.NOT_FINISHED
        self._message = ""
        self._failure: RequestFailed | None = None
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def holder(self) -> str | None:
        """Instance that holds the request; None while a placement is sought."""
        owned = self._home.requests.get(self.request_id)
        if owned is not None:
            self._holder = None if owned.holder is None else owned.holder.instance_id
        return self._holder

    def cancel(self) -> None:
        """Give the request up; no effect once it has ended."""
        self._cancel(self)

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Delta:
        while True:
            if self._tokens or (self._reason and not self._ended):
                tokens, self._tokens = self._tokens, []
                self._ended = bool(self._reason)
                if not self._logprobs:
                    return Delta(tokens, self._reason, self._message, self._cached)
                logprobs, self._logprobs = self._logprobs, []
                return Delta(tokens, self._reason, self._message, self._cached, logprobs)
            if self._failure is not None and not self._ended:
                self._ended = True
                raise self._failure
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    # ---- the writer's side

    def deliver(self, action: Deliver, producer: str | None) -> None:
        """Take in the next tokens."""
        self._tokens.extend(action.tokens)
        self._logprobs.extend(action.logprobs)
        self.num_output += len(action.tokens)
        self._cached = max(self._cached, action.cached_tokens)
        self._reason = action.finish_reason
        self._message = action.message
        if producer is not None:
            self._came_from(producer)
        self.stalled_since = None
        self.placements_failed = 0
        self._wake()

    def _came_from(self, producer: str) -> None:
        now = time.monotonic()
        if self.stalled_since is not None:
            self.stalls.append(now - self.stalled_since)
        elif producer != self.producer and self.producer is not None:
            self.pauses.append(now - self._delivered)
        self.producer = producer
        self._delivered = now

    def fail(self, failure: RequestFailed) -> None:
        """End with an error; tokens that came before are still read."""
        if not self._reason and self._failure is None:
            self._failure = failure
            self._wake()

    def end(self) -> None:
        """End without more; for a request that its client has given up."""
        self._tokens.clear()
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
