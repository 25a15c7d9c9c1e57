"""Counts what is inside, tells when everything has left, and can be marked closed to newcomers."""

from __future__ import annotations

import asyncio


class Occupancy:
    """For one event loop. Callers must check `closed` before they enter."""

    def __init__(self) -> None:
        self._inside = 0
        self._closed = False
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def inside(self) -> int:
        return self._inside

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self) -> None:
        """From now on nobody else may enter; those inside stay."""
        self._closed = True

    def enter(self) -> None:
        self._inside += 1
        self._empty.clear()

    def leave(self) -> None:
        self._inside -= 1
        if self._inside == 0:
            self._empty.set()

    async def wait_empty(self, timeout_seconds: float) -> bool:
        """False if the time runs out first."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True
