"""Server-sent events, and work that ends the moment its client is gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.gateway.backend import closing
from services.gateway.http_errors import error_answer

_T = TypeVar("_T")

SEND_TIMEOUT_SECONDS = 60.0
"""A client that reads nothing for this long is taken for gone: it holds a place others wait for."""


class ClientGoneError(Exception):
    """Nobody is left to answer."""


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of `work`, which is cancelled and unwound when the client disconnects.

    The request body must have been read: only then does `receive` wait for the disconnection.

    Raises:
        ClientGoneError: the client left first.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        await _cancel(gone)
        await _cancel(task)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(task: asyncio.Future[Any]) -> None:
    """Returns once the task has unwound. Its own errors are its caller's business."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # marks it as seen


class EventStreamResponse(Response):
    """`data:` events from payloads, then `[DONE]`. An error becomes the last event instead."""

    media_type = "text/event-stream"

    def __init__(self, payloads: AsyncIterator[str], headers: Mapping[str, str]) -> None:
        """payloads: JSON texts; closed when the response ends, however it ends."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._payloads = payloads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with closing(self._payloads):
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            try:
                await until_disconnect(receive, self._send_all(send))
            except ClientGoneError:
                return  # closing the payloads cancels what is left to do

    async def _send_all(self, send: Send) -> None:
        try:
            async for payload in self._payloads:
                await _send_event(send, payload)
            await _send_event(send, "[DONE]")
        except ClientGoneError:
            raise
        except Exception as error:
            await _send_event(send, json.dumps(error_answer(error).body()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_event(send: Send, payload: str) -> None:
    body = f"data: {payload}\n\n".encode()
    try:
        async with asyncio.timeout(SEND_TIMEOUT_SECONDS):
            await send({"type": "http.response.body", "body": body, "more_body": True})
    except TimeoutError:
        raise ClientGoneError from None


async def after_first(stream: AsyncIterator[_T], receive: Receive) -> AsyncIterator[_T]:
    """The same stream, once its first item is there: errors before it still get their own status.

    Raises:
        ClientGoneError: the client left first.
    """
    try:
        first = await until_disconnect(receive, _next(stream))
    except BaseException:
        async with closing(stream):
            raise
    return _Rejoined(first, stream)


async def _next(stream: AsyncIterator[_T]) -> _T:
    return await anext(stream)


class _Rejoined(AsyncIterator[_T]):
    """Not a generator: closing one that was never started would not close the rest."""

    def __init__(self, first: _T, rest: AsyncIterator[_T]) -> None:
        self._first = [first]
        self._rest = rest

    async def __anext__(self) -> _T:
        return self._first.pop() if self._first else await anext(self._rest)

    async def aclose(self) -> None:
        async with closing(self._rest):
            self._first.clear()
