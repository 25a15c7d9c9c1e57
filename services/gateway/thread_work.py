"""What threads go on with for a request whose client has left."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_T = TypeVar("_T")


class ThreadWork:
    """What threads do for one request. Begun, it cannot be stopped: it goes on when nobody waits any more."""

    def __init__(self) -> None:
        self._last: Future[object] | None = None

    async def wait(self, work: Future[_T]) -> _T:
        """Its result; one after the other. Cancelled, it takes back what has not begun."""
        self._last = work  # type: ignore[assignment]  # only ever waited for
        return await asyncio.wrap_future(work)

    def when_done(self, then: Callable[[], None]) -> None:
        """At once when no thread works for the request, else when it is done."""
        if self._last is None or self._last.done():
            then()
            return
        loop = asyncio.get_running_loop()

        def done(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop ended meanwhile, and nobody counts any more
                loop.call_soon_threadsafe(then)

        self._last.add_done_callback(done)
