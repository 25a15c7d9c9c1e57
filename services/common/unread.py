"""Bounds the calls that a client has had answered but does not read."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from dspark_core.errors import QueueFullError
from services.common.interceptors import Context, RpcCall


class UnreadLayer:
    """gRPC keeps an answer and its call, some 25 KB, until the client has read it or disconnects, and has no
    means to drop it. So a connection that leaves many unread gets no more. Must be inside the error layer."""

    def __init__(self, most: int) -> None:
        """`most`: for each connection."""
        self._most = most
        self._unread: Counter[str] = Counter()

    @asynccontextmanager
    async def around(self, call: RpcCall) -> AsyncIterator[None]:
        connection = call.context.peer()
        if self._unread[connection] >= self._most:
            raise QueueFullError(f"{call.method} refused: {self._most} earlier answers have not been read")
        try:
            yield
        finally:
            self._unread[connection] += 1
            call.context.add_done_callback(partial(self._read, connection))  # type: ignore[arg-type]  # not callable

    def _read(self, connection: str, _: Context[Any, Any]) -> None:
        self._unread[connection] -= 1
        if not self._unread[connection]:
            del self._unread[connection]
