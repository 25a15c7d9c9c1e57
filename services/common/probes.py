"""Bounds health checks and reflection, which need no key and do not count as calls."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.common.interceptors import RpcCall
from services.common.places import OldestGivesWay

MOST_PROBES = 64
"""Calls of each method at a time."""
MOST_PROBE_MESSAGES = 16
"""Messages being received at a time, for all probes together."""
MOST_UNREAD_PROBES = 16
"""Answers that a connection may leave unread."""
CHECK_SECONDS = 5.0
REFLECTION_SECONDS = 60.0
WATCH_SECONDS = 3600.0


class ProbeLayer:
    def __init__(self) -> None:
        self._places: dict[str, OldestGivesWay] = {}

    @asynccontextmanager
    async def around(self, call: RpcCall) -> AsyncIterator[None]:
        places = self._places.setdefault(call.method, OldestGivesWay(MOST_PROBES))
        async with places.place(call.method, _seconds(call)):
            yield


def _seconds(call: RpcCall) -> float:
    if not call.streaming:
        return CHECK_SECONDS
    return WATCH_SECONDS if call.method.startswith("/grpc.health.") else REFLECTION_SECONDS
