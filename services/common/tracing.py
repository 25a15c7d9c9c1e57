"""Spans of gRPC calls on both sides, linked by W3C trace context in the call's metadata.

Unary calls between the services have spans only as part of a trace. The others are housekeeping, such as
registrations, and would outnumber the requests by far.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from opentelemetry.trace import (
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from services.common.interceptors import RpcCall

_PROPAGATOR = TraceContextTextMapPropagator()  # stateless
_INTERNAL = ("/dspark.v1.SchedulerService/", "/dspark.v1.VerifierService/", "/dspark.v1.DrafterService/")


class TracingLayer:
    """A server span around each call but housekeeping, a child of the caller's."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    @asynccontextmanager
    async def around(self, call: RpcCall) -> AsyncIterator[None]:
        metadata = {str(key): str(value) for key, value in (call.context.invocation_metadata() or ())}
        caller = _PROPAGATOR.extract(metadata)
        if _is_housekeeping(call) and not get_current_span(caller).get_span_context().is_valid:
            yield
            return
        with self._tracer.start_as_current_span(
            call.method.removeprefix("/"),
            context=caller,
            kind=SpanKind.SERVER,
            attributes=_attributes(call.method),
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            except asyncio.CancelledError:
                _end(span, grpc.StatusCode.CANCELLED)
                raise
            except grpc.aio.AbortError:
                _end(span, call.context.code())
                raise
            _end(span, grpc.StatusCode.OK)


class _ClientTracing:
    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._ends: set[asyncio.Task[None]] = set()

    def _start(self, details: grpc.aio.ClientCallDetails) -> tuple[Span, grpc.aio.ClientCallDetails]:
        method = _text(details.method)
        span = self._tracer.start_span(
            method.removeprefix("/"), kind=SpanKind.CLIENT, attributes=_attributes(method)
        )
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, set_span_in_context(span))
        metadata = grpc.aio.Metadata(*(details.metadata or ()), *carrier.items())
        return span, grpc.aio.ClientCallDetails(
            details.method, details.timeout, metadata, details.credentials, details.wait_for_ready
        )

    async def _stream(
        self,
        continuation: Callable[..., Awaitable[Any]],
        details: grpc.aio.ClientCallDetails,
        requests: object,
    ) -> Any:  # noqa: ANN401 - whichever call the continuation makes
        span, details = self._start(details)
        try:
            call = await continuation(details, requests)
        except BaseException:
            span.end()
            raise
        call.add_done_callback(lambda _: self._stream_ended(span, call))
        return call

    def _stream_ended(self, span: Span, call: grpc.aio.Call) -> None:
        task = asyncio.ensure_future(_record_end(span, call, time.time_ns()))
        self._ends.add(task)  # the event loop keeps only a weak reference
        task.add_done_callback(self._ends.discard)


class TracingUnaryUnary(_ClientTracing, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(
        self,
        continuation: Callable[..., Awaitable[Any]],
        client_call_details: grpc.aio.ClientCallDetails,
        request: object,
    ) -> grpc.aio.UnaryUnaryCall[Any, Any]:
        if not get_current_span().get_span_context().is_valid:
            untraced: grpc.aio.UnaryUnaryCall[Any, Any] = await continuation(client_call_details, request)
            return untraced
        span, details = self._start(client_call_details)
        try:
            call: grpc.aio.UnaryUnaryCall[Any, Any] = await continuation(details, request)
            _end(span, await call.code())
            return call
        finally:
            span.end()


class TracingUnaryStream(_ClientTracing, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(
        self,
        continuation: Callable[..., Awaitable[Any]],
        client_call_details: grpc.aio.ClientCallDetails,
        request: object,
    ) -> grpc.aio.UnaryStreamCall[Any, Any]:
        call: grpc.aio.UnaryStreamCall[Any, Any] = await self._stream(
            continuation, client_call_details, request
        )
        return call


class TracingStreamStream(_ClientTracing, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(
        self,
        continuation: Callable[..., Awaitable[Any]],
        client_call_details: grpc.aio.ClientCallDetails,
        request_iterator: object,
    ) -> grpc.aio.StreamStreamCall[Any, Any]:
        call: grpc.aio.StreamStreamCall[Any, Any] = await self._stream(
            continuation, client_call_details, request_iterator
        )
        return call


def tracing_interceptors(tracer: Tracer) -> Sequence[grpc.aio.ClientInterceptor]:
    """For a channel. A stream's client span ends with the stream; a unary call outside a trace has none."""
    return (TracingUnaryUnary(tracer), TracingUnaryStream(tracer), TracingStreamStream(tracer))


def _is_housekeeping(call: RpcCall) -> bool:
    return not call.streaming and call.method.startswith(_INTERNAL)


def _attributes(method: str) -> dict[str, str]:
    service, _, name = method.removeprefix("/").rpartition("/")
    return {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}


def _end(span: Span, code: grpc.StatusCode) -> None:
    span.set_attribute("rpc.grpc.status_code", code.value[0])
    if code is not grpc.StatusCode.OK:
        span.set_status(Status(StatusCode.ERROR, code.name))


async def _record_end(span: Span, call: grpc.aio.Call, ended_at: int) -> None:
    try:
        _end(span, await call.code())  # a lost server has no span that records it
    finally:
        span.end(ended_at)


def _text(method: str | bytes) -> str:
    return method.decode() if isinstance(method, bytes) else method
