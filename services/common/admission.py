"""Bounds calls in flight and refuses new ones while draining."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from dspark_core.errors import DrainingError, QueueFullError
from services.common.interceptors import RpcCall
from services.common.occupancy import Occupancy


class AdmissionLayer:
    def __init__(self, max_calls: int) -> None:
        self._max_calls = max_calls
        self._calls = Occupancy()

    @property
    def in_flight(self) -> int:
        return self._calls.inside

    def close(self) -> None:
        """From now on new calls get UNAVAILABLE, which sends callers elsewhere."""
        self._calls.close()

    async def wait_idle(self, timeout_seconds: float) -> bool:
        """Waits until no call is in flight; False if the time runs out first."""
        return await self._calls.wait_empty(timeout_seconds)

    @asynccontextmanager
    async def around(self, call: RpcCall) -> AsyncIterator[None]:
        if self._calls.closed:
            raise DrainingError(f"{call.method} refused: this server is draining")
        if self._calls.inside >= self._max_calls:
            raise QueueFullError(f"{call.method} refused: {self._max_calls} calls are already in flight")
        self._calls.enter()
        try:
            yield
        finally:
            self._calls.leave()
