"""Opens client channels: keepalive, message limits, default deadlines, trace propagation, TLS."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from services.common.limits import CLIENT_KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS, MAX_MESSAGE_BYTES
from services.common.telemetry import Telemetry
from services.common.tls import Tls
from services.common.tracing import tracing_interceptors

DEFAULT_TIMEOUT_SECONDS = 10.0

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A peer that vanished without a reset is noticed within a minute even on an idle stream: after 40 s, or
    # 60 s if a bandwidth-measuring ping was in flight. A shorter limit would cut off machines that stall.
    ("grpc.keepalive_time_ms", CLIENT_KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Replicas restart in seconds; gRPC's default backoff grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Despite its name, this is how long one attempt to connect may take.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Channels of different services in one process must not share a connection's backoff.
    ("grpc.use_local_subchannel_pool", 1),
)


class DefaultDeadline(grpc.aio.UnaryUnaryClientInterceptor):
    """Unary calls made without a timeout get one, so that none waits forever."""

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds

    async def intercept_unary_unary(
        self,
        continuation: Callable[..., Awaitable[Any]],
        client_call_details: grpc.aio.ClientCallDetails,
        request: object,
    ) -> grpc.aio.UnaryUnaryCall[Any, Any]:
        details = client_call_details
        if details.timeout is None:
            details = grpc.aio.ClientCallDetails(
                details.method,
                self._timeout_seconds,
                details.metadata,
                details.credentials,
                details.wait_for_ready,
            )
        call: grpc.aio.UnaryUnaryCall[Any, Any] = await continuation(details, request)
        return call


def open_channel(
    address: str,
    telemetry: Telemetry | None = None,
    *,
    tls: Tls | None = None,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
) -> grpc.aio.Channel:
    """A channel to `host:port`. It connects on first use and reconnects by itself.

    `tls` None means plain text. The channel must be opened, used and closed inside one running event loop.
    """
    interceptors: list[grpc.aio.ClientInterceptor] = [DefaultDeadline(timeout_seconds)]
    if telemetry is not None and telemetry.tracing:
        interceptors.extend(tracing_interceptors(telemetry.tracer))
    if tls is None:
        return grpc.aio.insecure_channel(address, options=_OPTIONS, interceptors=interceptors)
    named = [*_OPTIONS, ("grpc.ssl_target_name_override", tls.name)]
    return grpc.aio.secure_channel(
        address, tls.channel_credentials(), options=named, interceptors=interceptors
    )
