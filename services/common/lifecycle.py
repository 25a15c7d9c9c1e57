"""Signals and cancellation around the life of a process."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable
from typing import Any

CANCEL_AGAIN_SECONDS = 1.0


@contextlib.asynccontextmanager
async def stop_signals() -> AsyncIterator[tuple[asyncio.Event, asyncio.Event]]:
    """Events set by the first and by the second SIGTERM or SIGINT."""
    first, second = asyncio.Event(), asyncio.Event()

    def received() -> None:
        (second if first.is_set() else first).set()

    loop = asyncio.get_running_loop()
    handled = (signal.SIGTERM, signal.SIGINT)
    for number in handled:
        loop.add_signal_handler(number, received)
    try:
        yield first, second
    finally:
        for number in handled:
            loop.remove_signal_handler(number)


async def end(task: asyncio.Future[Any]) -> None:
    """Cancels a task until it has ended, and retrieves its error so that asyncio does not warn of it.

    Once is not enough for a loop that retries: gRPC calls and Redis timeouts answer a cancellation that
    coincides with their own end with an ordinary error, and the loop goes on.
    """
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=CANCEL_AGAIN_SECONDS)
    if not task.cancelled():
        task.exception()


async def finished_before(work: Awaitable[object] | None, event: asyncio.Event) -> bool:
    """Runs `work`; cancels it and returns False if the event comes first. Raises what `work` raises."""
    if work is None:
        return not event.is_set()
    task = asyncio.ensure_future(work)
    waiter = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        return False
    finally:
        await end(task)
        await end(waiter)
