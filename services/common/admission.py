"""Counts calls in flight: bounds them, refuses new ones while draining, and tells when all ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from dspark_core.errors import QueueFullError, UnavailableError
from services.common.interceptors import RpcCall


class AdmissionLayer:
    def __init__(self, max_calls: int) -> None:
        self._max_calls = max_calls
        self._in_flight = 0
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def in_flight(self) -> int:
        return self._in_flight

    def close(self) -> None:
        """From now on new calls get UNAVAILABLE, which tells callers to go elsewhere."""
        self._closed = True

    async def wait_idle(self, timeout_seconds: float) -> bool:
        """Waits until no call is in flight; False when the time ran out first."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    @asynccontextmanager
    async def around(self, call: RpcCall) -> AsyncIterator[None]:
        if self._closed:
            raise UnavailableError(f"{call.method} refused: this server is draining")
        if self._in_flight >= self._max_calls:
            raise QueueFullError(f"{call.method} refused: {self._max_calls} calls are already in flight")
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._idle.set()
