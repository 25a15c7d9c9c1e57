"""Ends waits from outside: one timer for a whole stream, where one for each item costs more than the item.

`asyncio.timeout` is for a single wait. Around every token of a stream it took a quarter of the time that the
gateway spends on the token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from types import TracebackType
from typing import TypeVar

_T = TypeVar("_T")

_LOOKS_PER_LIMIT = 4


class Interruption:
    """Waits of a stream, and the error that they end with once there is one. Used as a context manager, it
    stops its timers at the end. One event loop only; several tasks may wait at once."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._error: Exception | None = None
        self._waiting: dict[asyncio.Task[object], float] = {}  # and since when
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def __enter__(self) -> Interruption:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for timer in self._timers.values():
            timer.cancel()

    @property
    def waiting_since(self) -> float | None:
        """The event loop's time at which the longest of the waits that go on began."""
        return min(self._waiting.values(), default=None)

    async def wait(self, awaitable: Awaitable[_T]) -> _T:
        """Its result. Raises the error of the interruption, which may come before or meanwhile."""
        if self._error is not None:
            close = getattr(awaitable, "close", None)
            if close is not None:
                close()  # nobody will await it
            raise self._error
        task = asyncio.current_task(self._loop)
        if task is None:
            raise AssertionError("a wait belongs into a task")
        cancelling = task.cancelling()
        self._waiting[task] = self._loop.time()
        try:
            return await awaitable
        except asyncio.CancelledError:
            # As `asyncio.timeout` does: a cancellation of somebody else's goes on.
            if self._error is not None and task.uncancel() <= cancelling:
                raise self._error from None
            raise
        finally:
            del self._waiting[task]

    def interrupt(self, error: Exception) -> None:
        """Ends all waits with the error, those to come too. The first one stays."""
        if self._error is not None:
            return
        self._error = error
        for task in self._waiting:
            task.cancel()

    def after(self, seconds: float, error: Exception) -> None:
        """Interrupts so many seconds from now."""
        self._timers["all"] = self._loop.call_later(seconds, self.interrupt, error)

    def limit_each(self, seconds: float, error: Exception) -> None:
        """Interrupts when a wait takes longer than that, or up to a quarter longer."""
        since = self.waiting_since
        if since is not None and self._loop.time() - since >= seconds:
            self.interrupt(error)
            return
        pause = seconds / _LOOKS_PER_LIMIT
        self._timers["each"] = self._loop.call_later(pause, self.limit_each, seconds, error)
