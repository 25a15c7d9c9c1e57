"""Errors that may leave a service, and those that must not."""

import grpc
import grpc.aio
import pytest

from dspark_core.errors import (
    AuthenticationError,
    CheckpointError,
    ContextLengthError,
    DeadlineError,
    DraftUnavailableError,
    DrainingError,
    DSparkError,
    InvalidRequestError,
    NoVerifierError,
    QueueFullError,
    UnavailableError,
    UnknownModelError,
)
from services.common.rpc_errors import from_rpc_error, http_status, to_status

PUBLIC = [
    (InvalidRequestError("top_p is bad", field="top_p"), grpc.StatusCode.INVALID_ARGUMENT, 400),
    (
        ContextLengthError("too long", field="prompt_token_ids", limit=64),
        grpc.StatusCode.INVALID_ARGUMENT,
        400,
    ),
    (UnknownModelError("no such model", field="model"), grpc.StatusCode.NOT_FOUND, 404),
    (AuthenticationError("no key"), grpc.StatusCode.UNAUTHENTICATED, 401),
    (QueueFullError("full", retry_after_seconds=2.5), grpc.StatusCode.RESOURCE_EXHAUSTED, 429),
    (UnavailableError("nobody"), grpc.StatusCode.UNAVAILABLE, 503),
    (NoVerifierError("no verifier serves it"), grpc.StatusCode.UNAVAILABLE, 503),
    (DraftUnavailableError("no drafts"), grpc.StatusCode.UNAVAILABLE, 503),
    (DeadlineError("late"), grpc.StatusCode.DEADLINE_EXCEEDED, 504),
]


@pytest.mark.parametrize(("error", "code", "http"), PUBLIC)
def test_types_messages_and_details_make_the_round_trip(error: DSparkError, code: grpc.StatusCode, http: int):
    status = to_status(error)
    assert status is not None
    assert status.code is code
    assert http_status(error) == http
    received = from_rpc_error(
        grpc.aio.AioRpcError(
            code,
            initial_metadata=grpc.aio.Metadata(),
            trailing_metadata=grpc.aio.Metadata(*status.metadata),
            details=status.message,
        )
    )
    assert type(received) is type(error)
    assert str(received) == str(error)
    for detail in ("field", "limit", "retry_after_seconds"):
        assert getattr(received, detail, None) == getattr(error, detail, None)


def test_a_draining_peer_says_so_and_is_one_replica_less_for_its_caller():
    status = to_status(DrainingError("this gateway is draining"))
    assert status is not None
    assert (status.code, status.message) == (grpc.StatusCode.UNAVAILABLE, "this gateway is draining")
    assert dict(status.metadata)["dspark-error"] == "DrainingError"
    metadata = grpc.aio.Metadata(*status.metadata)
    received = from_rpc_error(
        grpc.aio.AioRpcError(status.code, grpc.aio.Metadata(), metadata, details=status.message)
    )
    assert type(received) is UnavailableError  # else a gateway would tell its clients that it drains


@pytest.mark.parametrize("error", [ValueError("x"), CheckpointError("/secret/path"), KeyError("k")])
def test_internal_errors_have_no_public_status(error: Exception):
    assert to_status(error) is None
    assert http_status(error) == 500


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, UnavailableError),
        (grpc.StatusCode.CANCELLED, UnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, QueueFullError),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequestError),
        (grpc.StatusCode.UNIMPLEMENTED, DSparkError),
    ],
)
def test_failures_of_the_transport_become_the_nearest_error(code: grpc.StatusCode, kind: type[DSparkError]):
    error = from_rpc_error(
        grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details="connection lost")
    )
    assert type(error) is kind
    assert "connection lost" in str(error)


def test_a_stream_that_ended_while_something_was_sent_has_lost_its_peer():
    error = from_rpc_error(
        grpc.aio.AioRpcError(
            grpc.StatusCode.INTERNAL,
            grpc.aio.Metadata(),
            grpc.aio.Metadata(),
            details="Internal error from Core",
        )
    )
    assert type(error) is UnavailableError


def test_a_peer_cannot_break_the_mapping_with_nonsense():
    error = from_rpc_error(
        grpc.aio.AioRpcError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            grpc.aio.Metadata(),
            grpc.aio.Metadata(("retry-after", "soon"), ("dspark-error", "os.system")),
            details="full",
        )
    )
    assert isinstance(error, QueueFullError)
    assert error.retry_after_seconds == 1.0
