"""Errors as OpenAI clients expect them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from dspark_core.errors import (
    AuthenticationError,
    ContextLengthError,
    DeadlineError,
    DrainingError,
    DSparkError,
    InvalidRequestError,
    QueueFullError,
    QuotaError,
    UnavailableError,
    UnknownModelError,
)
from services.common.rpc_errors import http_status, message_of, shortened

_log = logging.getLogger(__name__)

UNAVAILABLE_RETRY_SECONDS = 2
"""Roughly how long it takes until routing has replaced a lost replica by another."""


class BodyTooLargeError(InvalidRequestError):
    """The request body is larger than this gateway reads."""


class SlowBodyError(InvalidRequestError):
    """The client took too long to send its body."""


class MediaTypeError(InvalidRequestError):
    """The request body is declared as something other than JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorAnswer:
    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    retry_after_seconds: float | None = None

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers: dict[str, str] = {}
        if self.retry_after_seconds is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_seconds)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


# Most specific first; any other error is an internal one.
_KINDS: tuple[tuple[type[DSparkError], str, str | None], ...] = (
    (UnknownModelError, "invalid_request_error", "model_not_found"),
    (ContextLengthError, "invalid_request_error", "context_length_exceeded"),
    (BodyTooLargeError, "invalid_request_error", "request_too_large"),
    (MediaTypeError, "invalid_request_error", "unsupported_media_type"),
    (SlowBodyError, "invalid_request_error", "request_timeout"),
    (InvalidRequestError, "invalid_request_error", None),
    (AuthenticationError, "authentication_error", "invalid_api_key"),
    (QuotaError, "rate_limit_error", "rate_limit_exceeded"),
    (QueueFullError, "rate_limit_error", "queue_full"),
    (DrainingError, "service_unavailable_error", "draining"),
    (UnavailableError, "service_unavailable_error", "no_verifier"),
    (DeadlineError, "timeout_error", "deadline_exceeded"),
)
_OWN_STATUS: Mapping[type[DSparkError], int] = {
    SlowBodyError: 408,
    BodyTooLargeError: 413,
    MediaTypeError: 415,
}


def error_answer(error: Exception) -> ErrorAnswer:
    """The answer for a client. Unexpected errors are logged under a reference, and only that is shown."""
    for kind, error_type, code in _KINDS:
        if isinstance(error, kind):
            return ErrorAnswer(
                status=_OWN_STATUS.get(kind) or http_status(error),
                message=message_of(error),
                type=error_type,
                param=error.field if isinstance(error, InvalidRequestError) else None,
                code=code,
                retry_after_seconds=_retry_after(error),
            )
    reference = uuid.uuid4().hex[:12]
    _log.error("unexpected error (reference %s)", reference, exc_info=error)
    return ErrorAnswer(
        status=500,
        message=f"internal error, reference {reference}",
        type="server_error",
        code="internal_error",
    )


def _retry_after(error: DSparkError) -> float | None:
    if isinstance(error, QueueFullError):
        return error.retry_after_seconds
    return UNAVAILABLE_RETRY_SECONDS if isinstance(error, UnavailableError) else None


_MOST_PROBLEMS = 100
"""Reading the first problem builds all of them, which for a bad enough body takes seconds and gigabytes."""


def invalid_body(error: ValidationError) -> InvalidRequestError:
    """Names the first wrong field and its value."""
    problems = error.error_count()
    if problems > _MOST_PROBLEMS:
        return InvalidRequestError(f"the request body is wrong in {problems} places, too many to name them")
    first = error.errors(include_url=False, include_input=False)[0]  # the input may be the whole body
    kind, message = first["type"], first["msg"]
    if kind == "json_invalid":
        return InvalidRequestError(f"the request body is not valid JSON: {message}")
    location = first["loc"]
    if kind == "extra_forbidden":  # the field's name can be any string
        above, name = field_path(location[:-1]), shortened(str(location[-1]), _MOST_SHOWN)
        param = f"{above}.{name}" if above else name
        return InvalidRequestError(f"unrecognised request argument: {param}", field=param)
    param = field_path(location)
    if kind == "missing":
        return InvalidRequestError(f"{param} is required but missing", field=param)
    if kind == "too_long":
        limit, length = first["ctx"]["max_length"], first["ctx"]["actual_length"]
        return InvalidRequestError(f"{param} must hold at most {limit} items, got {length}", field=param)
    if not param:
        return InvalidRequestError(f"the request body is wrong: {message}")
    value = error.errors(include_url=False, include_context=False)[0].get("input")
    return InvalidRequestError(f"{param}: {message}, got {_shown(value)}", field=param)


def field_path(location: Sequence[int | str]) -> str:
    """('messages', 0, 'role') -> 'messages[0].role'; names of union members are left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int"):
            path += f".{part}" if path else part
    return path


_MOST_SHOWN = 100
"""Characters shown of a value, or of an unknown field's name."""


def _shown(value: object) -> str:
    return shortened(repr(value), _MOST_SHOWN)


def install_error_handlers(app: FastAPI, api_paths: Sequence[str]) -> None:
    """api_paths: paths to suggest when one is not found."""

    async def project_error(_: Request, error: Exception) -> JSONResponse:
        return error_answer(error).response()

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        if not isinstance(error, HTTPException):
            raise TypeError(f"expected an HTTPException, got {error!r}")
        message, code = f"{request.method} {request.url.path}: {error.detail}", None
        if error.status_code == 404:  # usually another OpenAI API, or a base URL without /v1
            message, code = f"{message}; served are {', '.join(api_paths)}", "unknown_url"
        answer = ErrorAnswer(
            status=error.status_code, message=message, type="invalid_request_error", code=code
        )
        response = answer.response()
        response.headers.update(error.headers or {})  # such as `Allow` with 405
        return response

    app.add_exception_handler(DSparkError, project_error)
    app.add_exception_handler(Exception, project_error)
    app.add_exception_handler(HTTPException, http_error)
