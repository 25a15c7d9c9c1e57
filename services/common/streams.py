"""Helpers for long-lived streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TypeVar

T = TypeVar("T")


async def until(event: asyncio.Event, items: AsyncIterator[T]) -> AsyncIterator[T]:
    """Yields items until they end or the event is set, whichever comes first."""
    stopped = asyncio.create_task(event.wait())
    upcoming: asyncio.Task[T] | None = None
    try:
        while not event.is_set():
            upcoming = asyncio.ensure_future(_next(items))
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


async def _next(items: AsyncIterator[T]) -> T:
    return await anext(items)
