"""From the router's tokens to the choices of an answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import NamedTuple

from cluster.gateway.detokenizer import OutputText
from cluster.gateway.errors import ApiError, from_failure
from cluster.gateway.logprobs import Scored
from cluster.gateway.metrics import RequestTimer
from cluster.gateway.stream import Delta, RequestFailed, RequestStream
from instance.request import FinishReason, Request

_FINISH_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "abort",
}


class Piece(NamedTuple):
    """Text that is new in a choice; the last one has a finish reason.

    ``stop_reason`` is the stop string or stop token that ended it (vLLM's extension).
    ``scored`` are the tokens that came with it, where log-probabilities are asked for; their
    text may be in a later piece.
    """

    choice: int
    text: str
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    scored: Sequence[Scored] = ()


class Choice:
    """One of the answers to an HTTP request: a request of its own in the cluster.

    Args:
        index: Its index among the answer's choices.
        request: What runs.
        stream: Its output.
        output: Makes text of it.
        timer: Started.
        echo: Text before the output.
        counts_prompt: Its prompt counts in the answer's usage: that of several choices for
            one prompt does once.
    """

    def __init__(
        self,
        index: int,
        request: Request,
        stream: RequestStream,
        output: OutputText,
        timer: RequestTimer,
        echo: str = "",
        counts_prompt: bool = True,
    ) -> None:
        self.index = index
        self.counts_prompt = counts_prompt
        self.cached_tokens = 0
        self._request = request
        self._stream = stream
        self._output = output
        self._timer = timer
        self._echo = echo

    @property
    def prompt_tokens(self) -> int:
        return len(self._request.prompt)

    @property
    def completion_tokens(self) -> int:
        return self._output.num_tokens

    def cancel(self) -> None:
        """Give the request up; no effect once it has ended."""
        self._stream.cancel()

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The choice's text. The request is cancelled if this is closed before the end.

        Raises:
            ApiError: if the request cannot go on.
        """
        outcome = "cancelled"
        try:
            async for delta in self._stream:
                self.cached_tokens = max(self.cached_tokens, delta.cached_tokens)
                reason = delta.finish_reason
                if reason is FinishReason.ERROR:
                    # The instance refuses this very request; another would as well.
                    outcome = "error"
                    raise ApiError(400, delta.message or "the request cannot be served")
                first = not self._timer.started
                if delta.tokens:
                    self._timer.tokens(self._stream)
                text = self._output.push(delta.tokens, last_stops=reason is FinishReason.STOP)
                if reason is not FinishReason.NOT_FINISHED:
                    text += self._output.flush()
                if first:
                    text = self._echo + text
                scored = self._scored(delta) if delta.logprobs else ()
                if self._output.matched is not None:
                    outcome = "stop"
                    self._stream.cancel()
                    yield Piece(self.index, text, "stop", self._output.matched, scored)
                    return
                if reason is not FinishReason.NOT_FINISHED:
                    outcome = _FINISH_REASONS[reason]
                    token = delta.tokens[-1] if delta.tokens else None
                    stopped = reason is FinishReason.STOP
                    known = stopped and token in self._request.params.stop_token_ids
                    yield Piece(self.index, text, outcome, token if known else None, scored)
                    return
                if text or first or scored:
                    yield Piece(self.index, text, scored=scored)
            outcome = "error"
            raise ApiError(500, "the request ended without a result", code="internal_error")
        except RequestFailed as failure:
            outcome = "error"
            raise from_failure(failure) from None
        finally:
            self._stream.cancel()
            self._timer.finished(
                outcome,
                self.prompt_tokens,
                self.cached_tokens,
                self.completion_tokens,
                self._stream,
            )

    def _scored(self, delta: Delta) -> list[Scored]:
        """The tokens of a delta that count, with their log-probabilities."""
        offsets = self._output.take_offsets()
        taken = zip(delta.tokens, offsets, delta.logprobs, strict=False)
        return [Scored(*one) for one in taken]


def all_pieces(choices: Sequence[Choice]) -> AsyncGenerator[Piece, None]:
    """Pieces of all choices as they come. The first failure ends all of them."""
    return choices[0].pieces() if len(choices) == 1 else _merged(choices)


async def _merged(choices: Sequence[Choice]) -> AsyncGenerator[Piece, None]:
    queue: asyncio.Queue[Piece] = asyncio.Queue(maxsize=len(choices))

    async def forward(pieces: AsyncGenerator[Piece, None]) -> None:
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                await queue.put(piece)

    tasks = {asyncio.create_task(forward(choice.pieces())) for choice in choices}
    try:
        async for piece in _drain(queue, tasks):
            yield piece
    finally:
        for task in tasks:
            task.cancel()
        for choice in choices:  # a task cancelled before its first step cleans nothing up
            choice.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _drain(
    queue: asyncio.Queue[Piece], tasks: set[asyncio.Task[None]]
) -> AsyncIterator[Piece]:
    running = set(tasks)
    while running or not queue.empty():
        if queue.empty():
            getter = asyncio.ensure_future(queue.get())
            try:
                done, _ = await asyncio.wait(
                    {getter, *running}, return_when=asyncio.FIRST_COMPLETED
                )
            finally:
                getter.cancel()
            for task in done & running:
                task.result()  # raises what ended it
            running -= done
            if getter in done:
                yield getter.result()
        else:
            yield queue.get_nowait()
