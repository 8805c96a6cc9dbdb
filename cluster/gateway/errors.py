"""Errors as the OpenAI API shapes them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import math
from http import HTTPStatus

import orjson
from starlette.responses import Response

from cluster.gateway.stream import RequestFailed

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """An answer other than success.

    Attributes:
        status: HTTP status.
        message: For people; holds nothing internal.
        param: The parameter at fault, if it is one.
        code: For programs.
        type: Kind of error; by default the one that fits the status.
        retry_after: Seconds after which trying again makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.type = type or _TYPES.get(status, "server_error")
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers

    def body(self) -> bytes:
        """The JSON of the answer, also sent as an event once a stream has begun."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return orjson.dumps({"error": error})

    def response(self) -> Response:
        return Response(
            self.body(), self.status, media_type="application/json", headers=self.headers
        )


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that will never be served as it is."""
    return ApiError(400, message, param=param, code=code)


def internal() -> ApiError:
    """What a client sees of a fault in the gateway; the log has the rest."""
    return ApiError(500, "internal server error", code="internal_error")


def from_failure(failure: RequestFailed) -> ApiError:
    """What the router says of a request that cannot go on."""
    return ApiError(
        failure.status,
        failure.message or HTTPStatus(failure.status).phrase,
        code=failure.code,
        type=failure.type,
        retry_after=failure.retry_after,
    )
