"""A load client of the completions endpoint, in a process of its own.

It speaks HTTP/1.1 by hand: a general client costs more per token than the gateway under test.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, cast

import uvloop

SEEDS_PER_STREAM = 1_000_000
SEEDS_PER_LOAD = 1_000_000 * SEEDS_PER_STREAM
"""A seed tells its load and its stream: no two requests of a run share one."""
END_OF_BODY = b"\r\n0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Load:
    """What the client does: ``concurrency`` streams, each one request after another.

    Attributes:
        host, port: Where the gateway listens.
        concurrency: Streams at a time, a connection each.
        seconds: For how long requests are begun; those begun are read to their end.
        prompt: Token ids, shared by all requests.
        max_tokens: Output tokens of a request.
        pause: A stream waits up to this many seconds between two requests, and before its
            first, so that streams keep no step with one another.
        number: Of the load among those of one run.
        arrivals: Note when each event came, not only the first and the last.
    """

    host: str
    port: int
    concurrency: int
    seconds: float
    prompt: tuple[int, ...]
    max_tokens: int
    pause: float
    number: int = 0
    arrivals: bool = True


@dataclass(slots=True)
class Answer:
    """One streamed answer, in seconds of the machine's monotonic clock.

    Attributes:
        seed: Of the request; no two requests share one.
        sent: When the request was written.
        first, last: When the first and the last event came.
        events: Events with tokens.
        arrivals: When each came, if asked for.
    """

    seed: int
    sent: float
    first: float = 0.0
    last: float = 0.0
    events: int = 0
    arrivals: list[float] = field(default_factory=list)


class _Connection(asyncio.Protocol):
    """Reads one answer at a time; counts the blank lines that end its events."""

    def __init__(self, keep: bool) -> None:
        self._keep = keep
        self._answer: Answer | None = None
        self._done: asyncio.Future[None] | None = None
        self._tail = b""
        self._head = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not isinstance: the transports of uvloop are no subclasses.
        self._transport = cast(asyncio.Transport, transport)

    def ask(self, request: bytes, answer: Answer) -> asyncio.Future[None]:
        self._answer = answer
        self._tail = self._head = b""
        self._done = asyncio.get_running_loop().create_future()
        answer.sent = time.monotonic()
        self._transport.write(request)
        return self._done

    def close(self) -> None:
        self._done = None
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        answer = self._answer
        assert answer is not None
        assert self._done is not None
        if len(self._head) < 12:
            self._head = (self._head + data)[:12]
            if len(self._head) == 12 and self._head != b"HTTP/1.1 200":
                self._done.set_exception(RuntimeError(repr(data[:400])))
                return
        # An event may end in one segment and its second line break be in the next.
        events = data.count(b"\n\n") + (self._tail.endswith(b"\n") and data.startswith(b"\n"))
        self._tail = (self._tail + data[-len(END_OF_BODY) :])[-len(END_OF_BODY) :]
        ended = self._tail == END_OF_BODY
        if ended:
            events -= 1  # [DONE]
        if events > 0:
            if not answer.events:
                answer.first = now
            answer.last = now
            answer.events += events
            if self._keep:
                answer.arrivals.extend([now] * events)
        if ended and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error or ConnectionError("the gateway closed a connection"))


async def _stream(load: Load, number: int, until: float, answers: list[Answer]) -> None:
    chance = random.Random(number)
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(
        lambda: _Connection(load.arrivals), load.host, load.port
    )
    count = 0
    while True:
        await asyncio.sleep(chance.random() * load.pause)
        if time.monotonic() >= until:
            break
        seed = load.number * SEEDS_PER_LOAD + number * SEEDS_PER_STREAM + count
        answer = Answer(seed=seed, sent=0.0)
        count += 1
        body = json.dumps(
            {
                "prompt": load.prompt,
                "max_tokens": load.max_tokens,
                "stream": True,
                "ignore_eos": True,
                "temperature": 1.0,
                "seed": answer.seed,
            }
        ).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {load.host}:{load.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        await connection.ask(head.encode() + body, answer)
        answers.append(answer)
    connection.close()


async def run_load(load: Load) -> list[Answer]:
    """Run a load to its end; raises what a stream met, RuntimeError for an HTTP error."""
    answers: list[Answer] = []
    until = time.monotonic() + load.seconds
    await asyncio.gather(
        *(_stream(load, number, until, answers) for number in range(load.concurrency))
    )
    return answers


def serve(pipe: Connection) -> None:
    """Run each ``Load`` read from the pipe and answer it with its ``Answer`` list, or with
    the exception that ended it."""
    while True:
        try:
            load: Load = pipe.recv()
        except EOFError:
            return
        result: Any
        try:
            result = uvloop.run(run_load(load))
        except Exception as error:
            result = error
        pipe.send(result)
