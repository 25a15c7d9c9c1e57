"""Ends the waits of a stream from outside, with one timer for the whole stream instead of one per item.

`asyncio.timeout` serves a single wait: around every token of a stream, it took a quarter of the time that the
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
    """Runs the waits of a stream and, once interrupted, ends them with an error. As a context manager it
    cancels its timers on exit. For one event loop; several tasks may wait at once."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._error: Exception | None = None
        self._waiting: dict[asyncio.Task[object], float] = {}  # -> loop time at which its wait began
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
        """Event loop time at which the longest current wait began; None if there is none."""
        return min(self._waiting.values(), default=None)

    async def wait(self, awaitable: Awaitable[_T]) -> _T:
        """Returns the result. Raises the error of an interruption that came before or comes meanwhile."""
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
            # As in `asyncio.timeout`: a cancellation by someone else propagates.
            if self._error is not None and task.uncancel() <= cancelling:
                raise self._error from None
            raise
        finally:
            del self._waiting[task]

    def interrupt(self, error: Exception) -> None:
        """Ends all current and future waits with the error. Only the first call counts."""
        if self._error is not None:
            return
        self._error = error
        for task in self._waiting:
            task.cancel()

    def after(self, seconds: float, error: Exception) -> None:
        """Interrupts `seconds` from now."""
        self._timers["all"] = self._loop.call_later(seconds, self.interrupt, error)

    def limit_each(self, seconds: float, error: Exception) -> None:
        """Interrupts when a single wait exceeds `seconds`, which is noticed up to a quarter later."""
        since = self.waiting_since
        if since is not None and self._loop.time() - since >= seconds:
            self.interrupt(error)
            return
        pause = seconds / _LOOKS_PER_LIMIT
        self._timers["each"] = self._loop.call_later(pause, self.limit_each, seconds, error)
