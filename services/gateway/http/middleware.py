"""One span and one count per HTTP request, streams included. Plain ASGI: nothing is buffered."""

from __future__ import annotations

from opentelemetry.trace import NoOpTracer, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.metrics import GatewayMetrics

_PROPAGATOR = TraceContextTextMapPropagator()  # stateless
_OTHER = "other"


class ObserveRequests:
    def __init__(
        self,
        app: ASGIApp,
        *,
        tracer: Tracer,
        metrics: GatewayMetrics,
        routes: frozenset[str],
        probes: frozenset[str],
    ) -> None:
        """routes: paths with a label of their own; all others share one. probes: routes that are polled every
        few seconds; they are counted but, like gRPC's health checks, not traced."""
        self._app = app
        self._tracer = tracer
        self._metrics = metrics
        self._routes = routes
        self._probes = probes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = self._route(scope["path"])
        status = 0  # no answer: the client left first

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        tracer = NoOpTracer() if route in self._probes else self._tracer
        with tracer.start_as_current_span(
            f"{scope['method']} {route}",
            context=_PROPAGATOR.extract(headers),
            kind=SpanKind.SERVER,
            attributes={"http.request.method": scope["method"], "http.route": route},
        ) as span:
            try:
                await self._app(scope, receive, observed_send)
            except Exception:
                status = 500  # answered by the server, outside of this middleware
                raise
            finally:
                span.set_attribute("http.response.status_code", status)
                if status >= 500:
                    span.set_status(Status(StatusCode.ERROR))
                self._metrics.http_request(route, status)

    def _route(self, path: str) -> str:
        if path in self._routes:
            return path
        return "/v1/models/{id}" if path.startswith("/v1/models/") else _OTHER
