"""Errors in OpenAI's form, with the status that its clients expect."""

from __future__ import annotations

import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from kvpsi.admission import TurnedAwayError
from kvpsi.errors import CacheRefusedError, EnvironmentProblem, KvpsiError, PromptTooLongError, UsageError
from kvpsi.serving.engine import ShuttingDownError

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(KvpsiError):
    """Something that a client is told.

    Args:
        status: of the HTTP response.
        message: one sentence.
        code: OpenAI's word for it, where there is one.
        param: the field that is wrong.
    """

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def error_body(status: int, message: str, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The body that OpenAI's clients read."""
    kind = _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def as_api_error(error: KvpsiError) -> ApiError:
    """Any error as what a client is told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptTooLongError):
        return ApiError(400, str(error), code="context_length_exceeded", param="messages")
    if isinstance(error, UsageError):
        return ApiError(400, str(error))
    if isinstance(error, TurnedAwayError):
        return ApiError(429, str(error), code="rate_limit_exceeded")
    if isinstance(error, ShuttingDownError | CacheRefusedError | EnvironmentProblem):
        return ApiError(503, str(error))
    return ApiError(500, str(error))


def response_to(error: KvpsiError) -> JSONResponse:
    """The response that tells of an error."""
    told = as_api_error(error)
    headers = {}
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is None and told.status == 503:
        retry_after_s = 1.0
    if retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
        headers["retry-after-ms"] = str(max(1, round(1000 * retry_after_s)))
    if told.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = error_body(told.status, str(told), code=told.code, param=told.param)
    return JSONResponse(body, told.status, headers)


def install(app: FastAPI) -> None:
    """Have every error of an application told in this form."""

    @app.exception_handler(KvpsiError)
    async def on_error(_: Request, error: KvpsiError) -> JSONResponse:
        return response_to(error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(http: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            reason = first.get("ctx", {}).get("error", "it ends too early")
            return response_to(ApiError(400, f"The body is not valid JSON: {reason}."))
        if "json" not in http.headers.get("content-type", "") and http.method == "POST":
            return response_to(ApiError(400, "The body is not JSON; send it with Content-Type: application/json."))
        where = ".".join(str(part) for part in first["loc"] if part != "body") or None
        message = f"{first['msg']} (in {where})." if where else f"The body is not valid: {first['msg']}."
        return response_to(ApiError(400, message, param=where))

    @app.exception_handler(HTTPException)
    async def on_http(_: Request, error: HTTPException) -> JSONResponse:
        response = JSONResponse(error_body(error.status_code, f"{error.detail}."), error.status_code)
        response.headers.update(error.headers or {})
        return response
