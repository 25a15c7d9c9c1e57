"""A slot that holds only the newest item: a slow consumer skips items that were superseded."""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """For one consumer."""

    def __init__(self) -> None:
        self._item: T | None = None
        self._closed = False
        self._changed = asyncio.Event()

    def put(self, item: T) -> bool:
        """Returns True if it replaced an item that was not taken."""
        replaced = self._item is not None
        self._item = item
        self._changed.set()
        return replaced

    @property
    def empty(self) -> bool:
        return self._item is None

    def close(self) -> None:
        self._closed = True
        self._changed.set()

    async def take(self) -> T | None:
        """Waits for an item; None once the mailbox is closed and empty."""
        while self._item is None and not self._closed:
            self._changed.clear()
            await self._changed.wait()
        item, self._item = self._item, None
        return item
