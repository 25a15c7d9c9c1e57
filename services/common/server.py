"""A gRPC server with health, limits and a drain; and `serve`, which runs one until a signal.

Lifecycle: start (NOT_SERVING), warm up, SERVING; on SIGTERM NOT_SERVING, drain hook, refuse new
calls, wait for those in flight, exit. Nothing here depends on what the calls do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dspark_core.errors import ConfigError
from services.common.addresses import address_of
from services.common.admission import AdmissionLayer
from services.common.garbage import spare_what_was_loaded
from services.common.health import PartHealthServicer, Problem, problems
from services.common.interceptors import Chain, DeadlineLayer, ErrorLayer, Layer, LayeredInterceptor
from services.common.lifecycle import finished_before, stop_signals
from services.common.limits import KEEPALIVE_TIMEOUT_MS, MIN_PING_INTERVAL_MS
from services.common.metrics_http import MetricsServer
from services.common.options import ServerOptions
from services.common.places import InTurn, OldestGivesWay
from services.common.probes import MOST_PROBE_MESSAGES, MOST_UNREAD_PROBES, ProbeLayer
from services.common.rpc_metrics import MetricsLayer
from services.common.telemetry import Telemetry
from services.common.tracing import TracingLayer
from services.common.unread import UnreadLayer

_log = logging.getLogger(__name__)

Register = Callable[[grpc.aio.Server], str | None]
"""Returns the full name of the service that it has added, under which health knows it too."""
Hook = Callable[[], Awaitable[None]]

_CONNECTION_GRACE_MS = 1000
"""For calls on a connection that has reached its age. Short, because streams do not end by themselves."""


class GrpcServer:
    """Usable by itself where a process has signal handling of its own (embedded, tests)."""

    def __init__(
        self,
        options: ServerOptions,
        registrations: Sequence[Register],
        telemetry: Telemetry,
        *,
        parts: Mapping[str, Problem] | None = None,
        apart: Mapping[str, int] | None = None,
    ) -> None:
        """
        Args:
            parts: Health details by name, for gRPC's health service and `/readyz`.
            apart: Methods (`/package.Service/Method`) whose calls do not count among `max_calls`, with the
                most of each.
        """
        self._options = options
        self._registrations = tuple(registrations)
        self._telemetry = telemetry
        self._admission = AdmissionLayer(options.max_calls, apart)
        self._parts = dict(parts or {})
        self._health = PartHealthServicer(self._parts)
        self._services: list[str] = []
        self._server: grpc.aio.Server | None = None
        self._metrics: MetricsServer | None = None
        self._port = options.port
        self._ready = False
        self._draining = False
        self._sent_away: asyncio.Task[None] | None = None

    @property
    def telemetry(self) -> Telemetry:
        return self._telemetry

    @property
    def port(self) -> int:
        return self._port

    @property
    def metrics_port(self) -> int | None:
        return self._metrics.port if self._metrics else None

    @property
    def ready(self) -> bool:
        return self._ready

    @property
    def in_flight(self) -> int:
        """Calls running now, health checks not counted."""
        return self._admission.in_flight

    async def start(self) -> int:
        """Listens and answers, but is not ready yet. Returns the port; raises ConfigError if it is taken."""
        options = self._options
        server = grpc.aio.server(
            # Not gRPC's `maximum_concurrent_rpcs`: that would refuse health checks too.
            interceptors=[LayeredInterceptor(self._calls(), _probes())],
            options=_channel_options(options),
        )
        self._services = [name for register in self._registrations if (name := register(server))]
        await self._set_health(serving=False)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if options.metrics_port is not None:
            self._metrics = MetricsServer(
                registry=self._telemetry.registry,
                ready=lambda: self._ready,
                details=lambda: problems(self._parts),
                port=options.metrics_port,
                host=options.host,
            )
        self._server = server
        try:
            self._port = _listen(server, options)
        except RuntimeError as error:
            await self.stop()
            address = address_of(options.host, options.port)
            raise ConfigError(f"cannot listen on {address}: {error}") from error
        await server.start()
        return self._port

    async def mark_ready(self) -> None:
        """After warm-up: health says SERVING."""
        if self._draining:
            return
        self._ready = True
        await self._set_health(serving=True)

    async def drain(self, on_drain: Hook | None = None) -> bool:
        """Becomes not ready, runs the hook (deregister, end long streams), then waits for calls in flight.

        New calls are refused once the hook is done. All of it together takes at most `drain_seconds`;
        False if calls outlived that. A failing hook is logged and does not stop the drain.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._options.drain_seconds
        self._ready = False
        self._draining = True
        await self._set_health(serving=False)
        if on_drain is not None:
            try:
                async with asyncio.timeout_at(deadline):
                    await on_drain()
            except Exception:
                _log.exception("the drain hook of %s failed", self._telemetry.service)
        self._admission.close()
        idle = await self._admission.wait_idle(max(0.0, deadline - loop.time()))
        if not idle:
            _log.warning(
                "%d calls still ran after %g s of draining", self.in_flight, self._options.drain_seconds
            )
        return idle

    def send_away(self) -> None:
        """Makes connected clients send their next calls elsewhere (GOAWAY); running calls continue.

        A refused call would fail for its client, which would keep calling over the same connection. The port
        closes too. Only for draining: calls still running after `drain_seconds` are cancelled.
        """
        if self._server is not None and self._sent_away is None:
            farewell = self._server.stop(self._options.drain_seconds)
            self._sent_away = asyncio.create_task(farewell, name="goaway")

    async def stop(self) -> None:
        """Cancels calls still running and releases the ports. Safe to call twice."""
        self._ready = False
        if self._server is not None:
            await self._server.stop(None)
            if self._sent_away is not None:
                await self._sent_away
            self._server = None
        if self._metrics is not None:
            metrics, self._metrics = self._metrics, None
            await asyncio.to_thread(metrics.close)

    def _calls(self) -> Chain:
        tracing: list[Layer] = [TracingLayer(self._telemetry.tracer)] if self._telemetry.tracing else []
        layers = [
            *tracing,
            MetricsLayer(self._telemetry.registry),
            ErrorLayer(),
            UnreadLayer(self._options.max_calls),
            self._admission,
            DeadlineLayer(self._options.unary_timeout_seconds),
        ]
        most = self._options.max_arriving
        return Chain(layers) if most is None else Chain(layers, InTurn(most))

    async def _set_health(self, *, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for name in ("", *self._services):
            await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)


async def serve(
    server: GrpcServer,
    *,
    warm_up: Hook | None = None,
    on_drain: Hook | None = None,
    until: Hook | None = None,
) -> None:
    """Runs a server until SIGTERM or SIGINT, then drains it; a second signal skips the drain.

    Raises what `warm_up` raises. A signal during warm-up cancels it. When `until` returns, the server
    ends as on a signal. Shuts down the server's telemetry, which sends the last spans.
    """
    async with stop_signals() as (stop, stop_now):
        await server.start()
        try:
            if await finished_before(warm_up() if warm_up else None, stop):
                spare_what_was_loaded()
                await server.mark_ready()
                _log.info("ready on port %d", server.port)
                await finished_before((until or asyncio.Event().wait)(), stop)
            _log.info("draining")
            await finished_before(server.drain(on_drain), stop_now)
        finally:
            await server.stop()
            await asyncio.to_thread(server.telemetry.shutdown)
            _log.info("stopped")


def _probes() -> Chain:
    layers: list[Layer] = [ErrorLayer(), UnreadLayer(MOST_UNREAD_PROBES), ProbeLayer()]
    return Chain(layers, OldestGivesWay(MOST_PROBE_MESSAGES))


def _listen(server: grpc.aio.Server, options: ServerOptions) -> int:
    """Returns the port. Raises RuntimeError if it is taken."""
    address = address_of(options.host, options.port)
    if options.tls is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, options.tls.server_credentials())


def _channel_options(options: ServerOptions) -> list[tuple[str, int]]:
    chosen = [
        ("grpc.max_receive_message_length", options.max_message_bytes),
        ("grpc.max_send_message_length", options.max_message_bytes),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        # gRPC's default minimum of 5 minutes would disconnect our clients.
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        # A taken port must be an error, not two servers sharing it by chance.
        ("grpc.so_reuseport", 0),
    ]
    if options.max_arriving_bytes is not None:
        # gRPC would raise the flow-control window to megabytes for each request that waits for its turn.
        chosen.append(("grpc.http2.bdp_probe", 0))
    if options.max_connection_seconds:
        chosen += [
            ("grpc.max_connection_age_ms", max(1, round(1000 * options.max_connection_seconds))),
            ("grpc.max_connection_age_grace_ms", _CONNECTION_GRACE_MS),
        ]
    return chosen
