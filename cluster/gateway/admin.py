"""The operators' API under ``/admin/``, and what anybody may ask: health, metrics, version."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from cluster.config import GatewayConfig
from cluster.gateway import schemas
from cluster.gateway.api import OpenAIApi, json_response
from cluster.gateway.auth import AdminKey
from cluster.gateway.connection import read_body
from cluster.gateway.errors import ApiError, from_failure
from cluster.gateway.metrics import GatewayMetrics
from cluster.gateway.router import RequestFailed, Router

logger = logging.getLogger(__name__)

_MAX_BODY = 64 * 1024
_FIGURES_TIMEOUT = 2.0
"""Seconds that a scrape waits for the dispatcher; scrapers wait ten by default."""
# What the dispatcher says of an order that it cannot follow.
_STATUSES = {"unknown_request": 404, "unknown_instance": 404, "conflict": 409}


def version() -> str:
    """Drover's version; "0" where it runs from a source tree that is not installed."""
    try:
        return importlib.metadata.version("drover")
    except importlib.metadata.PackageNotFoundError:
        return "0"


class OperatorApi:
    """Endpoints for operators and for what watches the gateway.

    Args:
        config: Settings of the gateway.
        router: Its way to the dispatcher.
        api: Whose draining shows in ``/health``.
        key: The admin key.
        metrics: What ``/metrics`` shows.
    """

    def __init__(
        self,
        config: GatewayConfig,
        router: Router,
        api: OpenAIApi,
        key: AdminKey,
        metrics: GatewayMetrics,
    ) -> None:
        self._config = config
        self._router = router
        self._api = api
        self._key = key
        self._metrics = metrics
        self._version = version()

    def routes(self) -> list[Route]:
        def admin(
            path: str, method: str, endpoint: Callable[[HttpRequest], Awaitable[Response]]
        ) -> Route:
            async def checked(http: HttpRequest) -> Response:
                self._key.check(http.headers)
                return await endpoint(http)

            return Route(f"/admin/{path}", checked, methods=[method])

        return [
            Route("/health", self.health, methods=["GET"]),
            Route("/live", self.live, methods=["GET"]),
            Route("/metrics", self.show_metrics, methods=["GET"]),
            Route("/version", self.show_version, methods=["GET"]),
            admin("status", "GET", self.status),
            admin("check", "GET", self.check),
            admin("requests", "GET", self.requests),
            admin("migrate", "POST", self.migrate),
            admin("drain", "POST", self.drain),
            admin("resume", "POST", self.resume),
        ]

    # ---- for anybody

    async def health(self, http: HttpRequest) -> Response:
        """200 while requests can be served."""
        instances = self._router.view.instances
        ready = sum(1 for instance in instances if instance.state == "ready")
        if self._api.draining:
            status = "draining"
        elif not ready:
            status = "no instance is ready"
        else:
            status = "ok"
        counts = {"ready": ready, "known": len(instances)}
        answer = json_response(
            {"status": status, "instances": counts}, 200 if status == "ok" else 503
        )
        if status != "ok":
            answer.headers["retry-after"] = "1"
        return answer

    async def live(self, http: HttpRequest) -> Response:
        """200 while the process answers at all."""
        return json_response({"status": "ok"})

    async def show_metrics(self, http: HttpRequest) -> Response:
        """The exposition; with the dispatcher's last figures while it does not answer."""
        try:
            told = await self._router.dispatcher_call("figures", timeout=_FIGURES_TIMEOUT)
        except Exception as error:
            self._metrics.dispatcher_up.set(0)
            logger.debug("no figures from the dispatcher: %s", error)
        else:
            self._metrics.dispatcher_up.set(1)
            self._metrics.figures.take(told["dispatcher"], told["instances"])
        body, content_type = self._metrics.expose(http.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    async def show_version(self, http: HttpRequest) -> Response:
        return json_response({"version": self._version})

    # ---- for operators

    async def status(self, http: HttpRequest) -> Response:
        """What the dispatcher knows, and this gateway."""
        status = await self._dispatcher("status")
        gateway = {
            "gateway_id": self._config.gateway_id,
            "version": self._version,
            "active": self._router.active,
            "draining": self._api.draining,
        }
        return json_response({**status, "gateway": gateway})

    async def check(self, http: HttpRequest) -> Response:
        """Integrity and use of every instance's block pool."""
        return json_response(await self._dispatcher("check"))

    async def requests(self, http: HttpRequest) -> Response:
        """The requests whose home is this gateway."""
        return json_response(
            {
                "gateway_id": self._config.gateway_id,
                "requests": self._router.describe_requests(),
            }
        )

    async def migrate(self, http: HttpRequest) -> Response:
        """Move a request; answers when the attempt has ended, whatever its outcome."""
        body = schemas.validate(schemas.MigrateBody, await _object(http))
        try:
            report = await self._dispatcher("migrate", body.request_id, body.destination or None)
        except ApiError as error:
            if error.code in _STATUSES:
                error.message = f"{body.request_id}: {error.message}"
            raise
        return json_response(dataclasses.asdict(report))

    async def drain(self, http: HttpRequest) -> Response:
        """Move everything off an instance, and give it nothing new."""
        return await self._order("drain", http, "draining")

    async def resume(self, http: HttpRequest) -> Response:
        """End a drain."""
        return await self._order("resume", http, "ready")

    async def _order(self, order: str, http: HttpRequest, state: str) -> Response:
        body = schemas.validate(schemas.InstanceBody, await _object(http))
        await self._dispatcher(order, body.instance_id)
        return json_response({"instance_id": body.instance_id, "state": state})

    async def _dispatcher(self, method: str, *args: Any) -> Any:
        try:
            return await self._router.dispatcher_call(method, *args)
        except RequestFailed as failure:
            raise from_failure(failure) from None
        except Exception as error:
            raise _dispatcher_error(error) from error


def _dispatcher_error(error: Exception) -> Exception:
    """What an operator is told of a failed call to the dispatcher; the error itself if it is
    nothing that an operator could have meant."""
    # Ray wraps what an actor raises; the wrapper's own text is a traceback.
    cause = getattr(error, "cause", None)
    code = getattr(cause, "code", None)
    if isinstance(code, str) and code in _STATUSES:
        return ApiError(_STATUSES[code], str(cause), code=code)
    if isinstance(cause, ValueError):
        return ApiError(404, str(cause), code="not_found")
    # A name without an actor is a ValueError, an actor that died an error of Ray's own.
    if cause is None and (
        isinstance(error, ValueError) or type(error).__module__ == "ray.exceptions"
    ):
        return ApiError(503, "the dispatcher does not answer", retry_after=2)
    return error


async def _object(http: HttpRequest) -> dict[str, Any]:
    length = http.headers.get("content-length")
    return schemas.parse_object(await read_body(http.receive, length, _MAX_BODY))
