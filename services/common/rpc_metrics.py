"""Prometheus metrics of a gRPC server: calls by method and status, their duration, calls in flight."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.common.interceptors import RpcCall

# Streams last as long as an answer, hence the long tail.
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class MetricsLayer:
    """Must be outside the error layer, which has set the status by the time a call leaves it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._calls = Counter(
            "dspark_rpc_requests", "gRPC calls finished", ["method", "code"], registry=registry
        )
        self._seconds = Histogram(
            "dspark_rpc_seconds", "Duration of gRPC calls", ["method"], buckets=_BUCKETS, registry=registry
        )
        self._in_flight = Gauge(
            "dspark_rpc_in_flight", "gRPC calls running now", ["method"], registry=registry
        )

    @asynccontextmanager
    async def around(self, call: RpcCall) -> AsyncIterator[None]:
        started = time.perf_counter()
        self._in_flight.labels(call.method).inc()
        code = grpc.StatusCode.OK
        try:
            yield
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.AbortError:
            code = call.context.code()
            raise
        except BaseException:
            code = grpc.StatusCode.UNKNOWN
            raise
        finally:
            self._in_flight.labels(call.method).dec()
            self._seconds.labels(call.method).observe(time.perf_counter() - started)
            self._calls.labels(call.method, code.name).inc()
