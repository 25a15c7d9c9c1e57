"""Bounds calls in flight, some methods apart from the others, and refuses new ones while draining."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from dspark_core.errors import DrainingError, QueueFullError
from services.common.interceptors import RpcCall
from services.common.occupancy import Occupancy


class AdmissionLayer:
    def __init__(self, max_calls: int, apart: Mapping[str, int] | None = None) -> None:
        """`apart`: methods whose calls do not count among `max_calls`, with the most of each."""
        self._max_calls = max_calls
        self._apart = dict(apart or {})
        self._calls = Occupancy()
        self._inside: Counter[str] = Counter()
        """Calls in flight of each method that counts apart, and under "" of all others."""

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
        apart = self._apart.get(call.method)
        most, counted = (self._max_calls, "") if apart is None else (apart, call.method)
        if self._inside[counted] >= most:
            of_it = "" if apart is None else " of it"
            raise QueueFullError(f"{call.method} refused: {most} calls{of_it} are already in flight")
        self._calls.enter()
        self._inside[counted] += 1
        try:
            yield
        finally:
            self._inside[counted] -= 1
            self._calls.leave()
