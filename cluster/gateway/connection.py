"""A client's connection: its body within limits, and work that ends when it goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from cluster.gateway.errors import ApiError

T = TypeVar("T")

BODY_TIMEOUT = 30.0
"""Seconds that a client has to send its body."""


class ClientDisconnected(Exception):
    """The client is gone: nobody reads an answer."""


async def read_body(receive: Receive, length: str | None, limit: int) -> bytes:
    """Read a request's body.

    Args:
        receive: The ASGI channel.
        length: Value of the Content-Length header.
        limit: Bytes at most.

    Raises:
        ApiError: 413 once it is certain to be too large, 408 if it does not come.
        ClientDisconnected: if the client went away.
    """
    too_large = ApiError(413, f"the body is larger than {limit} bytes", code="request_too_large")
    if length is not None and length.isdecimal() and int(length) > limit:
        raise too_large
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnected
                part = message.get("body", b"")
                size += len(part)
                if size > limit:
                    raise too_large
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise ApiError(408, "the body did not arrive in time", code="request_timeout") from None


async def while_connected(
    work: Coroutine[Any, Any, T],
    receive: Receive,
    closing: asyncio.Future[None],
    timeout: float | None = None,
) -> T:
    """Run ``work`` for as long as its client waits for it.

    Args:
        work: Cancelled, and waited for, when this ends without its result.
        receive: The ASGI channel, whose body has been read.
        closing: Done when the gateway gives up what still runs.
        timeout: Seconds; None is unlimited.

    Raises:
        ClientDisconnected: if the client went away.
        ApiError: 503 when the gateway closes, 408 after the timeout.
        Exception: what ``work`` raises.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        ends: set[asyncio.Future[Any]] = {worker, watcher, closing}
        await asyncio.wait(ends, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        if watcher.done():
            raise ClientDisconnected
        if closing.done():
            raise shutting_down()
        raise ApiError(408, "the request took longer than allowed", code="request_timeout")
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


def shutting_down() -> ApiError:
    return ApiError(503, "the gateway is shutting down", code="shutting_down", retry_after=1)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
