"""gRPC health of a process and, by name, of its parts, whose state may change at any time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import grpc.aio
from grpc_health.v1 import health, health_pb2

Problem = Callable[[], str | None]
"""Describes what is wrong with a part now; None: nothing."""


class PartHealthServicer(health.aio.HealthServicer):  # type: ignore[misc]  # grpc_health has no types
    """`Check` with a part's name asks the part. Parts do not affect the health of the process, named ""."""

    def __init__(self, parts: Mapping[str, Problem]) -> None:
        super().__init__()
        self._parts = dict(parts)

    async def Check(  # noqa: N802 - the name gRPC calls
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> health_pb2.HealthCheckResponse:
        problem = self._parts.get(request.service)
        if problem is None:
            return await super().Check(request, context)
        status = health_pb2.HealthCheckResponse
        return status(status=status.SERVING if problem() is None else status.NOT_SERVING)


def problems(parts: Mapping[str, Problem]) -> list[str]:
    """One line, "part: problem", for each part that has one."""
    found = ((name, problem()) for name, problem in parts.items())
    return [f"{name}: {text}" for name, text in found if text is not None]
