"""The gateway's HTTP server: routes together, sockets, and an orderly stop."""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import socket
from collections.abc import Mapping
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.gateway.admin import OperatorApi
from cluster.gateway.api import CLIENT_CLOSED, OpenAIApi
from cluster.gateway.auth import AdminKey, ApiKeys
from cluster.gateway.config import GatewayConfig
from cluster.gateway.connection import ClientDisconnected
from cluster.gateway.errors import ApiError, internal
from cluster.gateway.metrics import GatewayMetrics
from cluster.gateway.router import Router
from cluster.gateway.tokenizer import ModelTokenizer

logger = logging.getLogger(__name__)

_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_BACKLOG = 2048
_KEEP_ALIVE = 75
"""Seconds that an idle connection stays open: longer than usual proxies and clients keep one,
so that it is they who close it and no request meets a closing connection."""


class PortInUseError(OSError):
    """The port belongs to another program."""


def check_port_free(host: str, port: int) -> None:
    """Make sure that nobody listens on a port.

    Gateways of one cluster share their port with SO_REUSEPORT; those of two clusters would
    do so too, and mix their clients. So whoever starts a cluster asks this first.

    Raises:
        PortInUseError: if somebody does.
        OSError: if the address is not one of this machine or needs privileges.
    """
    if port:
        bind(host, port, reuse_port=False).close()


def bind(host: str, port: int, *, reuse_port: bool) -> socket.socket:
    """A socket bound to an address, for :meth:`GatewayServer.start` to listen on.

    Raises:
        PortInUseError: if another program has the port.
        OSError: if the address is not one of this machine or needs privileges.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted connections inherit it: an event must not wait for the one before (Nagle).
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(address)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUseError(
                errno.EADDRINUSE, f"port {port} of {host} is in use by another program"
            ) from None
        raise
    return sock


class GatewayServer:
    """Serves HTTP around a router. Lives on one event loop.

    Args:
        config: Settings.
        router: Runs requests; started and closed by the caller.
        tokenizer: The model's.
        keys: Clients' keys.
    """

    def __init__(
        self, config: GatewayConfig, router: Router, tokenizer: ModelTokenizer, keys: ApiKeys
    ) -> None:
        model = config.served_model_name or config.model
        self.metrics = GatewayMetrics(
            config.gateway_id, model, lambda: router.view, lambda: router.active
        )
        self._config = config
        self._closing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._api = OpenAIApi(config, router, tokenizer, keys, self.metrics, self._closing)
        operators = OperatorApi(config, router, self._api, AdminKey(config.admin_key), self.metrics)
        starlette = Starlette(
            routes=[*self._api.routes(), *operators.routes()],
            exception_handlers={
                ApiError: _api_error,
                HTTPException: _http_error,
                ClientDisconnected: _disconnected,
                Exception: _fault,
            },
        )
        self.app: ASGIApp = _Envelope(starlette, self.metrics)
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Bind, and listen; returns the URL.

        Raises:
            OSError: if the address cannot be bound.
        """
        config = self._config
        sock = bind(config.host, config.port, reuse_port=config.reuse_port)
        self._server = uvicorn.Server(
            uvicorn.Config(
                self.app,
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE,
                # Only what does not heed the closing future is left by then.
                timeout_graceful_shutdown=2,
            )
        )
        self._serving = asyncio.create_task(self._server.serve([sock]))
        while not self._server.started:
            await asyncio.sleep(0.005)
            if self._serving.done():
                self._serving.result()
                raise OSError("the HTTP server ended while starting")
        host, port = sock.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def stop(self, grace: float) -> None:
        """Take no more requests, give those that run ``grace`` seconds, then end them.

        A client whose stream is ended gets an error event.
        """
        self._api.draining = True
        try:
            await self._stop(grace)
        finally:
            self._api.close()

    async def _stop(self, grace: float) -> None:
        if self._server is None or self._serving is None:
            return
        for listener in self._server.servers:
            listener.close()
        tasks = self._server.server_state.tasks
        if tasks:
            await asyncio.wait(set(tasks), timeout=grace)
        if not self._closing.done():
            self._closing.set_result(None)
        self._server.should_exit = True
        await self._serving
        self._server = self._serving = None


class _Envelope:
    """Around every answer: its ``x-request-id``, and its count.

    The client's own id is returned to it where it sent one; otherwise the cluster's.
    """

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        if not _REQUEST_ID.fullmatch(given):
            given = b""
        status = CLIENT_CLOSED

        async def enveloped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                request_id = given or state.get("request_id", "").encode()
                if request_id:
                    message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._app(scope, receive, enveloped)
        finally:
            self._metrics.http(*_route(scope), status)


_ROUTES = frozenset(
    (
        "/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize",
        "/health", "/live", "/metrics", "/version", "/admin/status", "/admin/check",
        "/admin/instances", "/admin/requests", "/admin/tenants", "/admin/policies",
        "/admin/migrate", "/admin/drain", "/admin/resume", "/admin/role",
    )
)  # fmt: skip
_PARTS = (("/v1/models/", "/v1/models/{model}"), ("/admin/tenants/", "/admin/tenants/{tenant}"))
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


def _route(scope: Mapping[str, Any]) -> tuple[str, str]:
    """Method and route of a request as labels, whose values are bounded."""
    path = scope["path"]
    if path not in _ROUTES:
        path = next((name for start, name in _PARTS if path.startswith(start)), "other")
    method = scope["method"]
    return method if method in _METHODS else "other", path


async def _api_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        answer = ApiError(404, f"there is no {http.method} {http.url.path[:200]}", code="not_found")
    else:
        answer = ApiError(error.status_code, error.detail)
    response = answer.response()
    response.headers.update(error.headers or {})
    return response


async def _disconnected(_: HttpRequest, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED)


async def _fault(_: HttpRequest, error: Exception) -> Response:
    # The HTTP server logs the traceback; the client gets none of it.
    return internal().response()
