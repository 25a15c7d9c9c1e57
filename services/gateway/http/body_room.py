"""Bounds the memory of request bodies that are arriving: they are held before any quota is looked at."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

from dspark_core.errors import QueueFullError

TOTAL_BYTES = 128 * 2**20
KEY_BYTES = 32 * 2**20
"""Of the bodies that one key sends."""
FREE_BYTES = 2**16
"""Of each body, not counted: no ordinary request is refused because large ones arrive."""


class BodyRoom:
    """For use on one event loop."""

    def __init__(
        self, max_body_bytes: int, total_bytes: int = TOTAL_BYTES, key_bytes: int = KEY_BYTES
    ) -> None:
        """max_body_bytes: of one body; there is always room for one of them."""
        self._key_bytes = max(key_bytes, max_body_bytes)
        self._total_bytes = max(total_bytes, self._key_bytes)
        self._held: Counter[str] = Counter()
        """By key."""

    @contextlib.contextmanager
    def place(self, key: str) -> Iterator[BodyPlace]:
        """Within the block, a body arrives. key: its name; empty: none is required."""
        place = BodyPlace(self, key)
        try:
            yield place
        finally:
            self._held[key] -= place.counted
            if not self._held[key]:
                del self._held[key]

    def take(self, key: str, size: int) -> None:
        """Called by places."""
        if key and self._held[key] + size > self._key_bytes:
            raise _no_room("that this key sends", self._key_bytes)
        if self._held.total() + size > self._total_bytes:
            raise _no_room("that arrive", self._total_bytes)
        self._held[key] += size


class BodyPlace:
    def __init__(self, room: BodyRoom, key: str) -> None:
        self._room = room
        self._key = key
        self.counted = 0

    def hold(self, size: int) -> None:
        """Has room for this many bytes of the body in all. Raises QueueFullError if there is none."""
        more = size - FREE_BYTES - self.counted
        if more > 0:
            self._room.take(self._key, more)
            self.counted += more


def _no_room(which: str, limit: int) -> QueueFullError:
    return QueueFullError(f"the request bodies {which} at this time need more than {limit} bytes")
