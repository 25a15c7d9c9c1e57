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
        """Admitted, but still being prepared or waiting for a place to run."""
        return self._waiting

    @property
    def draining(self) -> bool:
        return self._draining

    def enter(self) -> Ticket:
        """Lets one request in, before any work is spent on it. Its ticket must be closed.

        Raises:
            QueueFullError: all places to run and to wait are taken.
            UnavailableError: this gateway is draining.
        """
        if self._draining:
            raise UnavailableError("this gateway is draining, send the request to another one")
        if self._running + self._waiting >= self._max_running + self._max_waiting:
            raise QueueFullError(
                f"the gateway is full: {self._running} requests run and {self._waiting} wait, "
                f"the limits are {self._max_running} and {self._max_waiting}"
            )
        self._waiting += 1
        self._idle.clear()
        return Ticket(self)

    async def start(self) -> None:
        """Turns a waiting request into a running one, when a place is free. For tickets."""
        await self._places.acquire()
        self._waiting -= 1
        self._running += 1

    def leave(self, *, started: bool) -> None:
        """For tickets."""
        if started:
            self._running -= 1
            self._places.release()
        else:
            self._waiting -= 1
        if not self._running and not self._waiting:
            self._idle.set()

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


class Ticket:
    """One request's stay."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._started = False
        self._closed = False

    async def start(self, timeout_seconds: float) -> None:
        """Waits for a place to run; DeadlineError when none became free in time."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._admission.start()
                self._started = True
        except TimeoutError:
            raise DeadlineError(f"the request waited {timeout_seconds:g} s without being started") from None

    def close(self) -> None:
        """Gives the place back. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._admission.leave(started=self._started)
