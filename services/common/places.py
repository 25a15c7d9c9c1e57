"""Bounded numbers of places for calls and messages that clients may leave unfinished.

They matter most for messages: gRPC buffers one from the moment it is asked for until it is complete; before
that it holds no more of it than one flow-control window.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

from dspark_core.errors import DeadlineError, QueueFullError

TURN_SECONDS = 10.0
"""How long to wait for a place."""


class Places(Protocol):
    def place(self, what: str, seconds: float) -> AbstractAsyncContextManager[None]:
        """Held while inside, which ends with a DeadlineError after `seconds`."""
        ...


class InTurn:
    """Whoever comes when all places are taken waits, and gets a QueueFullError after `TURN_SECONDS`."""

    def __init__(self, most: int) -> None:
        self._free = asyncio.Semaphore(most)

    @asynccontextmanager
    async def place(self, what: str, seconds: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(TURN_SECONDS):
                await self._free.acquire()
        except TimeoutError:
            raise QueueFullError(f"too many calls at once before {what}") from None
        try:
            async with _at_most(what, seconds):
                yield
        finally:
            self._free.release()


class OldestGivesWay:
    """Whoever comes when all places are taken gets the oldest's, which ends with a QueueFullError.

    For work that is short or can begin again. If newcomers were refused, a client that leaves its calls open
    could shut out all others.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._inside: dict[asyncio.Timeout, None] = {}  # oldest first

    @asynccontextmanager
    async def place(self, what: str, seconds: float) -> AsyncIterator[None]:
        if len(self._inside) >= self._most:
            oldest = next(iter(self._inside))
            del self._inside[oldest]
            oldest.reschedule(0.0)
        given_way = asyncio.timeout(None)
        try:
            async with given_way:
                self._inside[given_way] = None
                async with _at_most(what, seconds):
                    yield
        except TimeoutError:
            if not given_way.expired():
                raise
            raise QueueFullError(f"{what} ended: {self._most} newer ones came") from None
        finally:
            self._inside.pop(given_way, None)


class Unlimited:
    """For callers that are trusted."""

    def place(self, what: str, seconds: float) -> AbstractAsyncContextManager[None]:
        return _at_most(what, seconds)


@asynccontextmanager
async def _at_most(what: str, seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineError(f"{what} did not end within {seconds:g} s") from None
