"""Answers of the two completion endpoints, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import orjson
from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cluster.gateway.connection import ClientDisconnected, while_connected
from cluster.gateway.errors import ApiError, internal
from cluster.gateway.generation import Choice, Piece, all_pieces
from cluster.gateway.logprobs import LogprobsFormat

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """Token counts of an answer so far; a prompt of several choices counts once."""
    prompts = [choice for choice in choices if choice.counts_prompt]
    prompt = sum(choice.prompt_tokens for choice in prompts)
    completion = sum(choice.completion_tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in prompts)},
    }


class AnswerFormat:
    """How pieces of text become JSON.

    Args:
        chat: For chat completions; otherwise for completions.
        answer_id: The ``id`` of the answer.
        model: Its ``model``.
        choices: The choices, for token counts.
        include_usage: A chunk with the token counts ends the stream.
        continuous_usage: Every chunk has the token counts so far (vLLM's extension).
        logprobs: The form of log-probabilities; None where they are not asked for.
    """

    def __init__(
        self,
        *,
        chat: bool,
        answer_id: str,
        model: str,
        choices: Sequence[Choice],
        include_usage: bool = False,
        continuous_usage: bool = False,
        logprobs: LogprobsFormat | None = None,
    ) -> None:
        self._chat = chat
        self._logprobs = logprobs
        self._choices = choices
        self._include_usage = include_usage
        self._continuous_usage = continuous_usage
        self._head = {
            "id": answer_id,
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        chunk_head = {**self._head, "object": "chat.completion.chunk"} if chat else self._head
        self._chunk_head = chunk_head
        # A chunk is these pieces of JSON around the text: no object is built per token.
        self._prefix = b"data: " + orjson.dumps(chunk_head)[:-1] + b',"choices":[{"index":'
        self._before_text = b',"delta":{"content":' if chat else b',"text":'
        self._before_logprobs = b'},"logprobs":' if chat else b',"logprobs":'
        self._after_text = (
            self._before_logprobs + b'null,"finish_reason":null}]',
            self._before_logprobs + b'null,"finish_reason":',
        )
        self._null_usage = b',"usage":null}\n\n' if include_usage else b"}\n\n"

    def whole(self, pieces: Sequence[Piece]) -> bytes:
        """The answer in one piece: its choices."""
        choices: list[dict[str, Any]] = []
        for piece in pieces:
            message = {"role": "assistant", "content": piece.text, "refusal": None}
            form = self._logprobs
            choices.append(
                {
                    "index": piece.choice,
                    **({"message": message} if self._chat else {"text": piece.text}),
                    "logprobs": None if form is None else form.render(piece.scored),
                    "finish_reason": piece.finish_reason,
                    "stop_reason": piece.stop_reason,
                }
            )
        return orjson.dumps({**self._head, "choices": choices, "usage": usage(self._choices)})

    def begin(self) -> bytes:
        """Events before any text: in a chat, who speaks."""
        if not self._chat:
            return b""
        roles = (
            self._prefix
            + str(choice.index).encode()
            + b',"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
            + self._usage()
            for choice in self._choices
        )
        return b"".join(roles)

    def chunk(self, piece: Piece) -> bytes:
        """The event for a piece; b"" where it says nothing."""
        going_on, ending = self._after_text
        if piece.scored and self._logprobs is not None:
            figures = orjson.dumps(self._logprobs.render(piece.scored))
            ending = self._before_logprobs + figures + b',"finish_reason":'
            going_on = ending + b"null}]"
        elif not piece.text and piece.finish_reason is None:
            return b""
        if piece.finish_reason is None:
            end = going_on
        else:
            end = b'%b%b,"stop_reason":%b}]' % (
                ending,
                orjson.dumps(piece.finish_reason),
                orjson.dumps(piece.stop_reason),
            )
        return b"".join(
            (
                self._prefix,
                str(piece.choice).encode(),
                self._before_text,
                orjson.dumps(piece.text),
                end,
                self._usage(),
            )
        )

    def end(self) -> bytes:
        """Events after the last piece."""
        if not self._include_usage:
            return DONE
        counts: dict[str, Any] = {**self._chunk_head, "choices": [], "usage": usage(self._choices)}
        return b"data: " + orjson.dumps(counts) + b"\n\n" + DONE

    def _usage(self) -> bytes:
        if not self._continuous_usage:
            return self._null_usage
        return b',"usage":' + orjson.dumps(usage(self._choices)) + b"}\n\n"


async def collect(pieces: AsyncGenerator[Piece, None], count: int) -> list[Piece]:
    """Read all choices to their ends: each as one piece."""
    parts: list[list[Piece]] = [[] for _ in range(count)]
    async for piece in pieces:
        parts[piece.choice].append(piece)
    return [
        own[-1]._replace(
            text="".join(piece.text for piece in own),
            scored=[one for piece in own for one in piece.scored],
        )
        for own in parts
    ]


class EventStream(Response):
    """Server-sent events of a generation.

    Headers wait for the first piece: until then a failure has its own status. An error from
    then on is an event and ends the stream without ``[DONE]``: an answer must never just stop.

    Args:
        choices: What is answered; given up if this ends before they do.
        form: How they look.
        closing: Done when the gateway gives up what still runs.
        timeout: Seconds for all of it, or None.
        disconnected: Called if the client goes away before the end.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        choices: Sequence[Choice],
        form: AnswerFormat,
        *,
        closing: asyncio.Future[None],
        timeout: float | None,
        disconnected: Callable[[], None],
    ) -> None:
        # Proxies must neither buffer nor keep what is streamed.
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        self.status_code = 200
        self.background: BackgroundTask | None = None
        self.init_headers(headers)
        self._choices = choices
        self._form = form
        self._closing = closing
        self._timeout = timeout
        self._disconnected = disconnected
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it.

        Raises:
            ApiError: what failed before the first piece.
            ClientDisconnected: if the client went away before it.
        """
        pieces = all_pieces(self._choices)
        try:
            await while_connected(self._write(pieces, send), receive, self._closing, self._timeout)
            return
        except ClientDisconnected:
            self._disconnected()
            if not self._started:
                raise
            return
        except Exception as failure:
            if not self._started:
                raise
            if isinstance(failure, ApiError):
                error = failure
            else:
                logger.exception("a stream failed")
                error = internal()
        finally:
            await pieces.aclose()
            for choice in self._choices:  # a generator that never began cleans nothing up
                choice.cancel()
        event = b"data: " + error.body() + b"\n\n"
        await send({"type": "http.response.body", "body": event, "more_body": False})

    async def _write(self, pieces: AsyncGenerator[Piece, None], send: Send) -> None:
        form = self._form
        async for piece in pieces:
            event = form.chunk(piece)
            if not self._started:
                self._started = True
                start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(start)
                event = form.begin() + event
            if event:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": form.end(), "more_body": False})
