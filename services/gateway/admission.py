"""Bounds running and waiting requests, refuses new ones while draining, and ends the remaining ones."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator

from dspark_core.errors import DeadlineError, DrainingError, QueueFullError
from services.common.interruption import Interruption
from services.common.occupancy import Occupancy
from services.common.retry_estimate import RetryEstimate


class Admission:
    """First come, first served. For use on one event loop."""

    def __init__(
        self, max_running: int, max_waiting: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._retry = RetryEstimate(clock)
        self._refused = 0
        """Refused requests that may come back before everybody else has left."""
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._places = asyncio.Semaphore(max_running)
        self._running = 0
        self._requests = Occupancy()
        self._waits: set[Interruption] = set()
        self._shut: DrainingError | None = None

    @property
    def running(self) -> int:
        return self._running

    @property
    def waiting(self) -> int:
        """Requests admitted but still being prepared or waiting for a place to run."""
        return self._requests.inside - self._running

    @property
    def draining(self) -> bool:
        return self._requests.closed

    def enter(self) -> Ticket:
        """Admits one request; see `enter_all`."""
        return self.enter_all(1)[0]

    def enter_all(self, count: int) -> list[Ticket]:
        """Admits `count` requests or none, before any work is spent on them. The tickets must be closed.

        Raises:
            QueueFullError: all places to run and to wait are taken.
            DrainingError: this gateway is draining.
        """
        if self._requests.closed:
            raise DrainingError("this gateway is draining, send the request to another one")
        places = self._max_running + self._max_waiting
        if self._requests.inside + count > places:
            kind = "is full" if count == 1 else f"has no room for {count} answers"
            # Those refused in a row are told to come back one after the other, as places become free.
            self._refused = min(self._refused + count, places)
            raise QueueFullError(
                f"the gateway {kind}: {self._requests.inside} requests are here, "
                f"{self._running} of them run; "
                f"{self._max_running} may run and {self._max_waiting} wait",
                retry_after_seconds=self._retry.seconds(self._refused),
            )
        for _ in range(count):
            self._requests.enter()
        return [Ticket(self) for _ in range(count)]

    async def start(self) -> None:
        """Waits for a free place and turns a waiting request into a running one. Called by tickets."""
        await self._places.acquire()
        self._running += 1

    def leave(self, *, started: bool) -> None:
        """Called by tickets."""
        if started:
            self._running -= 1
            self._places.release()
        self._requests.leave()
        self._retry.moved()
        self._refused = max(self._refused - 1, 0)

    def drain(self) -> None:
        """Refuses new requests from now on."""
        self._requests.close()

    async def wait_idle(self, timeout_seconds: float) -> bool:
        """Waits until no request is running or waiting; False if the time runs out first."""
        return await self._requests.wait_empty(timeout_seconds)

    @contextlib.contextmanager
    def ending(self, waits: Interruption) -> Iterator[None]:
        """Within the block, `shut` interrupts these waits of a request."""
        if self._shut is not None:
            waits.interrupt(self._shut)
        self._waits.add(waits)
        try:
            yield
        finally:
            self._waits.discard(waits)

    def shut(self) -> None:
        """Ends the remaining requests with a DrainingError, so that every client gets an answer."""
        self.drain()
        self._shut = DrainingError("this gateway shuts down and could not wait for the end of the request")
        for waits in tuple(self._waits):
            waits.interrupt(self._shut)


class Ticket:
    """One admitted request's place."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._started = False
        self._closed = False

    async def start(self, timeout_seconds: float) -> None:
        """Waits for a place to run. Raises DeadlineError if none becomes free in time."""
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
