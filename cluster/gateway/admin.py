"""The operators' API under ``/admin/``, and what anybody may ask: health, metrics, version."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import BaseModel
from starlette.datastructures import QueryParams
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from cluster.gateway import admin_bodies, schemas
from cluster.gateway.api import OpenAIApi, json_response
from cluster.gateway.auth import AdminKey
from cluster.gateway.config import GatewayConfig
from cluster.gateway.connection import read_body
from cluster.gateway.errors import ApiError, from_failure, invalid
from cluster.gateway.metrics import GatewayMetrics
from cluster.gateway.router import Router
from cluster.gateway.stream import RequestFailed

logger = logging.getLogger(__name__)

_MAX_BODY = 64 * 1024
_FIGURES_TIMEOUT = 2.0
"""Seconds that a scrape waits for the dispatcher; scrapers wait ten by default."""
# What the dispatcher says of an order that it cannot follow.
_STATUSES = {
    "unknown_request": 404,
    "unknown_instance": 404,
    "conflict": 409,
    "invalid_value": 400,
    "forbidden": 403,
}


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
            admin("instances", "GET", self.instances),
            admin("requests", "GET", self.requests),
            admin("tenants", "GET", self.tenants),
            admin("tenants/{tenant}", "PATCH", self.set_tenant),
            admin("policies", "GET", self.policies),
            admin("policies", "PATCH", self.set_policies),
            admin("migrate", "POST", self.migrate),
            admin("drain", "POST", self.drain),
            admin("resume", "POST", self.resume),
            admin("role", "POST", self.set_role),
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

    async def instances(self, http: HttpRequest) -> Response:
        """Every instance that is not gone, and its load."""
        return json_response({"instances": await self._dispatcher("instances")})

    async def requests(self, http: HttpRequest) -> Response:
        """The requests whose home is this gateway, or with ``scope=cluster`` all of them."""
        query = http.query_params
        match query.get("scope", "gateway"):
            case "gateway":
                _only(query, "scope")
                own = self._router.describe_requests()
                return json_response({"gateway_id": self._config.gateway_id, "requests": own})
            case "cluster":
                _only(query, "scope", "limit", "instance_id", "tenant")
                limit = query.get("limit", "256")
                if not (limit.isdecimal() and limit.isascii() and len(limit) <= 6):
                    raise invalid("limit: not a whole number below a million", "limit")
                found = await self._dispatcher(
                    "requests", int(limit), query.get("instance_id", ""), query.get("tenant", "")
                )
                return json_response(found)
        raise invalid("scope: neither 'gateway' nor 'cluster'", "scope")

    async def tenants(self, http: HttpRequest) -> Response:
        """Tenants: weight and limits, service had, and how far apart those who wait are."""
        return json_response(await self._dispatcher("tenants"))

    async def set_tenant(self, http: HttpRequest) -> Response:
        """Change a tenant's weight or limits; answers with what holds now."""
        changes = _changes(schemas.validate(admin_bodies.TenantBody, await _object(http)))
        tenant = http.path_params["tenant"]
        return json_response(await self._dispatcher("set_tenant", tenant, changes, _who(http)))

    async def policies(self, http: HttpRequest) -> Response:
        """The policies in force, those that exist, and who changed what."""
        return json_response(await self._dispatcher("policies"))

    async def set_policies(self, http: HttpRequest) -> Response:
        """Change policies; with ``dry_run`` only say what would have been decided."""
        body = schemas.validate(admin_bodies.PoliciesBody, await _object(http))
        changes = _changes(body, "dry_run")
        return json_response(
            await self._dispatcher("set_policies", changes, body.dry_run, _who(http))
        )

    async def set_role(self, http: HttpRequest) -> Response:
        """Change what an instance is for."""
        body = schemas.validate(admin_bodies.RoleBody, await _object(http))
        await self._dispatcher("set_role", body.instance_id, body.role)
        return json_response({"instance_id": body.instance_id, "role": body.role})

    async def migrate(self, http: HttpRequest) -> Response:
        """Move a request; answers when the attempt has ended, whatever its outcome."""
        body = schemas.validate(admin_bodies.MigrateBody, await _object(http))
        try:
            report = await self._dispatcher("migrate", body.request_id, body.destination or None)
        except ApiError as error:
            if error.code in _STATUSES:
                error.message = f"{body.request_id}: {error.message}"
            raise
        return json_response(dataclasses.asdict(report))

    async def drain(self, http: HttpRequest) -> Response:
        """Move everything off an instance, and give it nothing new."""
        body = schemas.validate(admin_bodies.DrainBody, await _object(http))
        await self._dispatcher("drain", body.instance_id, body.until_restart)
        return json_response({"instance_id": body.instance_id, "state": "draining"})

    async def resume(self, http: HttpRequest) -> Response:
        """End a drain."""
        body = schemas.validate(admin_bodies.InstanceBody, await _object(http))
        await self._dispatcher("resume", body.instance_id)
        return json_response({"instance_id": body.instance_id, "state": "ready"})

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
        return ApiError(_STATUSES[code], str(cause), code=code, param=getattr(cause, "param", None))
    if isinstance(cause, ValueError):
        return ApiError(404, str(cause), code="not_found")
    # A name without an actor is a ValueError, an actor that died an error of Ray's own.
    if cause is None and (
        isinstance(error, ValueError) or type(error).__module__ == "ray.exceptions"
    ):
        return ApiError(503, "the dispatcher does not answer", retry_after=2)
    return error


def _changes(body: BaseModel, *beside: str) -> dict[str, Any]:
    """The fields that were given, without those that are no change."""
    changes = body.model_dump(exclude_unset=True, exclude=set(beside))
    if not changes:
        known = sorted(set(type(body).model_fields) - set(beside))
        raise invalid(f"nothing to change: give one of {', '.join(known)}")
    return changes


def _only(query: QueryParams, *known: str) -> None:
    for name in query:
        if name not in known:
            raise invalid(f"unknown parameter {name[:40]!r}; known: {', '.join(known)}", name[:40])


def _who(http: HttpRequest) -> str:
    """Who gives an order, for the audit log: what the header says, and from where."""
    name = http.headers.get("x-drover-operator", "")[:64]
    host = http.client.host if http.client else "?"
    return f"{name} ({host})" if name else host


async def _object(http: HttpRequest) -> dict[str, Any]:
    length = http.headers.get("content-length")
    return schemas.parse_object(await read_body(http.receive, length, _MAX_BODY))
