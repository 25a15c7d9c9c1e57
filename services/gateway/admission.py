"""Bounds how many requests run and how many wait; refuses new ones while draining."""

from __future__ import annotations

import asyncio

from dspark_core.errors import DeadlineError, QueueFullError, UnavailableError


class Admission:
    """First come, first served. One event loop only."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._places = asyncio.Semaphore(max_running)
        self._running = 0
        self._waiting = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def running(self) -> int:
        return self._running

    @property
    def waiting(self) -> int:
        return self._waiting

    @property
    def draining(self) -> bool:
        return self._draining

    def check(self) -> None:
        """Refuses early, before work is spent on a request that could not be queued.

        Raises:
            QueueFullError: no place to wait is left.
            UnavailableError: this gateway is draining.
        """
        if self._draining:
            raise UnavailableError("this gateway is draining, send the request to another one")
        if self._running >= self._max_running and self._waiting >= self._max_waiting:
            raise QueueFullError(
                f"the gateway is full: {self._running} requests run and {self._waiting} wait, "
                f"the limits are {self._max_running} and {self._max_waiting}"
            )

    async def acquire(self, timeout_seconds: float) -> None:
        """Waits for a place, which must be given back with `release`.

        Raises:
            QueueFullError, UnavailableError: as `check`.
            DeadlineError: no place became free in time.
        """
        self.check()
        self._waiting += 1
        self._idle.clear()
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._places.acquire()
            self._running += 1
        except TimeoutError:
            raise DeadlineError(f"the request waited {timeout_seconds:g} s without being started") from None
        finally:
            self._waiting -= 1
            self._update_idle()

    def release(self) -> None:
        self._running -= 1
        self._places.release()
        self._update_idle()

    def drain(self) -> None:
        """From now on only requests that are already here are served."""
        self._draining = True

    async def wait_idle(self, timeout_seconds: float) -> bool:
        """Waits until nothing runs or waits; False when the time ran out first."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _update_idle(self) -> None:
        if not self._running and not self._waiting:
            self._idle.set()
