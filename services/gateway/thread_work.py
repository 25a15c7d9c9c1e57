"""Tracks work in threads, which continues for a request even after its client has disconnected."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_T = TypeVar("_T")


class ThreadWork:
    """Thread work for one request. Once begun it cannot be stopped, even if nobody waits for it any more."""

    def __init__(self, owner: str = "") -> None:
        """owner: the name of the key that pays for it."""
        self.owner = owner
        self._last: Future[object] | None = None

    @property
    def asked(self) -> bool:
        """Whether there was any."""
        return self._last is not None

    async def wait(self, work: Future[_T]) -> _T:
        """Returns the result. One call at a time. Cancelling it cancels work that has not begun."""
        self._last = work  # type: ignore[assignment]  # only ever waited for
        return await asyncio.wrap_future(work)

    def when_done(self, then: Callable[[], None]) -> None:
        """Calls `then` once no thread works for the request, at once if none does."""
        if self._last is None or self._last.done():
            then()
            return
        loop = asyncio.get_running_loop()

        def done(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended: `then` no longer matters
                loop.call_soon_threadsafe(then)

        self._last.add_done_callback(done)
