"""Maps the project's errors to gRPC statuses and HTTP codes, and gRPC failures back to errors.

The type travels as trailing metadata, so that a caller gets the very type that the callee raised; a
status alone cannot tell an over-long prompt from any other bad field.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import grpc
import grpc.aio

from dspark_core.errors import (
    AuthenticationError,
    ContextLengthError,
    DeadlineError,
    DraftUnavailableError,
    DrainingError,
    DSparkError,
    InvalidRequestError,
    NotLeaderError,
    NoVerifierError,
    QueueFullError,
    UnavailableError,
    UnknownModelError,
    UnreachableError,
)

MAX_MESSAGE_CHARACTERS, MAX_FIELD_CHARACTERS = 600, 200
"""Longest texts sent to a caller. Status and metadata of a failed call must fit into 8 KiB, where a character
takes up to twelve bytes; if they do not, the caller gets RESOURCE_EXHAUSTED instead, which means another
error."""

KIND_KEY = "dspark-error"
FIELD_KEY = "dspark-field"
LEADER_KEY = "dspark-leader"
LIMIT_KEY = "dspark-limit"
RETRY_AFTER_KEY = "retry-after"  # seconds, as in HTTP, but fractions are allowed


_NOT_CONNECTED = "failed to connect to all addresses"
"""How gRPC's message begins then; nothing else of such a failure tells it from a connection that broke."""
_NOT_SENT = "Internal error from Core"
"""gRPC's message for a stream that its peer ended while a message was being sent. It replaces the peer's
status, which is lost."""


@dataclass(frozen=True, slots=True)
class RpcStatus:
    """How a call ends: the arguments of `context.abort`."""

    code: grpc.StatusCode
    message: str
    metadata: tuple[tuple[str, str], ...] = ()


# Most specific first: the first class an error is an instance of decides.
_STATUS: tuple[tuple[type[DSparkError], grpc.StatusCode, int], ...] = (
    (UnknownModelError, grpc.StatusCode.NOT_FOUND, 404),
    (ContextLengthError, grpc.StatusCode.INVALID_ARGUMENT, 400),
    (InvalidRequestError, grpc.StatusCode.INVALID_ARGUMENT, 400),
    (AuthenticationError, grpc.StatusCode.UNAUTHENTICATED, 401),
    (QueueFullError, grpc.StatusCode.RESOURCE_EXHAUSTED, 429),
    (DraftUnavailableError, grpc.StatusCode.UNAVAILABLE, 503),
    (NotLeaderError, grpc.StatusCode.UNAVAILABLE, 503),
    (NoVerifierError, grpc.StatusCode.UNAVAILABLE, 503),
    (DrainingError, grpc.StatusCode.UNAVAILABLE, 503),
    (UnavailableError, grpc.StatusCode.UNAVAILABLE, 503),
    (DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED, 504),
)


def to_status(error: BaseException) -> RpcStatus | None:
    """The status of an error that is meant for the caller; None for one that must stay internal."""
    for kind, code, _ in _STATUS:
        if isinstance(error, kind):
            return RpcStatus(code, message_of(error), ((KIND_KEY, kind.__name__), *_details(error)))
    return None


def message_of(error: BaseException) -> str:
    """The message as callers get it, shortened because it may repeat values of theirs of any length."""
    return shortened(str(error), MAX_MESSAGE_CHARACTERS)


def shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[:most] + "…"


def http_status(error: BaseException) -> int:
    """The HTTP code of an error; 500 if the caller could not have caused it."""
    return next((code for kind, _, code in _STATUS if isinstance(error, kind)), 500)


def from_rpc_error(error: grpc.aio.AioRpcError) -> DSparkError:
    """The error the callee raised, or the nearest one when the transport failed."""
    metadata = {str(key): str(value) for key, value in (error.trailing_metadata() or ())}
    message = error.details() or error.code().name
    if error.code() is grpc.StatusCode.UNAVAILABLE and message.startswith(_NOT_CONNECTED):
        return UnreachableError(message)
    if error.code() is grpc.StatusCode.INTERNAL and message.startswith(_NOT_SENT):
        return UnavailableError("the stream was ended while a message was being sent")
    build = _BY_KIND.get(metadata.get(KIND_KEY, "")) or _BY_CODE.get(error.code())
    if build is None:
        return DSparkError(f"{error.code().name}: {message}")
    return build(message, metadata)


_Build = Callable[[str, dict[str, str]], DSparkError]


def _invalid(kind: type[InvalidRequestError]) -> _Build:
    return lambda message, metadata: kind(message, field=metadata.get(FIELD_KEY))


def _too_long(message: str, metadata: dict[str, str]) -> DSparkError:
    limit = metadata.get(LIMIT_KEY, "")
    return ContextLengthError(
        message, field=metadata.get(FIELD_KEY), limit=int(limit) if limit.isdecimal() else 0
    )


def _plain(kind: type[DSparkError]) -> _Build:
    return lambda message, _: kind(message)


def _queue_full(message: str, metadata: dict[str, str]) -> DSparkError:
    try:
        return QueueFullError(message, retry_after_seconds=float(metadata[RETRY_AFTER_KEY]))
    except (KeyError, ValueError):
        return QueueFullError(message)


_BY_KIND: dict[str, _Build] = {
    "UnknownModelError": _invalid(UnknownModelError),
    "ContextLengthError": _too_long,
    "InvalidRequestError": _invalid(InvalidRequestError),
    "AuthenticationError": _plain(AuthenticationError),
    "QueueFullError": _queue_full,
    "DraftUnavailableError": _plain(DraftUnavailableError),
    "NotLeaderError": lambda message, metadata: NotLeaderError(
        message, leader_address=metadata.get(LEADER_KEY, "")
    ),
    "NoVerifierError": _plain(NoVerifierError),
    "UnavailableError": _plain(UnavailableError),
    # A draining peer is merely unavailable to its caller, which must not claim to be draining itself.
    "DrainingError": _plain(UnavailableError),
    "DeadlineError": _plain(DeadlineError),
}

# For peers and failures that send no kind: gRPC itself, proxies, a lost connection.
_BY_CODE: dict[grpc.StatusCode, _Build] = {
    grpc.StatusCode.INVALID_ARGUMENT: _invalid(InvalidRequestError),
    grpc.StatusCode.RESOURCE_EXHAUSTED: _queue_full,
    grpc.StatusCode.UNAVAILABLE: _plain(UnavailableError),
    grpc.StatusCode.CANCELLED: _plain(UnavailableError),
    grpc.StatusCode.DEADLINE_EXCEEDED: _plain(DeadlineError),
}


def _details(error: DSparkError) -> list[tuple[str, str]]:
    details = []
    if isinstance(error, InvalidRequestError) and error.field and error.field.isascii():
        details.append((FIELD_KEY, error.field[:MAX_FIELD_CHARACTERS]))
    if isinstance(error, ContextLengthError) and error.limit:
        details.append((LIMIT_KEY, str(error.limit)))
    if isinstance(error, NotLeaderError) and error.leader_address.isascii():
        details.append((LEADER_KEY, error.leader_address))
    if isinstance(error, QueueFullError):
        details.append((RETRY_AFTER_KEY, f"{error.retry_after_seconds:g}"))
    return details
