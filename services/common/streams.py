"""Helpers for long-lived streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

T = TypeVar("T")


async def until(event: asyncio.Event, items: AsyncIterator[T]) -> AsyncIterator[T]:
    """Yields items until they end or the event is set, whichever comes first."""
    stopped = asyncio.create_task(event.wait())
    upcoming: asyncio.Task[T] | None = None
    try:
        while not event.is_set():
            upcoming = asyncio.ensure_future(next_of(items))
            await asyncio.wait({upcoming, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not upcoming.done():
                return
            try:
                item = upcoming.result()
            except StopAsyncIteration:
                return
            yield item
    finally:
        stopped.cancel()
        if upcoming is not None:
            upcoming.cancel()


async def next_of(items: AsyncIterator[T]) -> T:
    """`anext` as a coroutine, which a task can run; by itself it may return any awaitable."""
    return await anext(items)


@asynccontextmanager
async def closing(items: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """Closes an async iterator on exit if it can be closed, as generators can.

    Otherwise a generator that is left early lives on until it is garbage-collected.
    """
    try:
        yield items
    finally:
        close = getattr(items, "aclose", None)
        if close is not None:
            await close()
