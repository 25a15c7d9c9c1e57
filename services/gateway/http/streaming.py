"""Server-sent events, and work that is cancelled as soon as its client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.common.interruption import Interruption
from services.common.lifecycle import end
from services.common.streams import closing, next_of
from services.gateway.http.errors import ErrorAnswer, error_answer

_T = TypeVar("_T")

SEND_TIMEOUT_SECONDS = 60.0
"""A client that reads nothing for this long counts as gone: it holds a place others wait for."""
KEEP_ALIVE_SECONDS = 15.0
"""After this much silence a stream gets a comment: proxies cut idle connections, mostly after 60 s."""

_LINE_ENDS = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
"""Many line readers, httpx's among them, split at these as well. JSON has them in strings only, where they
may be escaped."""


class ClientGoneError(Exception):
    """The client has disconnected."""


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """Returns the result of `work`, which is cancelled and unwound if the client disconnects.

    The request body must have been read: only then does `receive` wait for the disconnect.

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
        await end(gone)
        await end(task)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class NamedEvent(NamedTuple):
    """For APIs whose events have names; events of the others are data only."""

    name: str
    data: str


Event = str | NamedEvent


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """How an API's streams end."""

    done: Event | None
    """The last event; None: the stream just ends."""
    failed: Callable[[ErrorAnswer], Event]
    """Makes the last event of a stream that fails."""


DONE_EVENT = StreamEnd("[DONE]", lambda answer: json.dumps(answer.body()))


class EventStreamResponse(Response):
    """Sends events, then the one that ends the stream, or an error event instead of it."""

    media_type = "text/event-stream"

    def __init__(
        self, payloads: AsyncIterator[Event], headers: Mapping[str, str], end: StreamEnd = DONE_EVENT
    ) -> None:
        """payloads: events with JSON data; closed when the response ends, however it ends."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._payloads = payloads
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with closing(self._payloads):
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            try:
                await until_disconnect(receive, self._send_all(send))
            except ClientGoneError:
                return  # closing the payloads cancels the generation

    async def _send_all(self, send: Send) -> None:
        with Interruption() as writes:
            writes.limit_each(SEND_TIMEOUT_SECONDS, ClientGoneError())
            await self._write_all(_Line(send, writes))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write_all(self, line: _Line) -> None:
        beats = asyncio.ensure_future(line.keep_alive())
        try:
            async for payload in self._payloads:
                await line.event(payload)
            if self._end.done is not None:
                await line.event(self._end.done)
        except ClientGoneError:
            raise
        except Exception as error:
            await line.event(self._end.failed(error_answer(error)))
        finally:
            await end(beats)


class _Line:
    """Writes events to one client and keeps the connection alive between them."""

    def __init__(self, send: Send, writes: Interruption) -> None:
        self._send = send
        self._writes = writes
        self._clock = asyncio.get_running_loop().time
        self._sent_at = self._clock()

    async def event(self, event: Event) -> None:
        name, payload = (
            (f"event: {event.name}\n", event.data) if isinstance(event, NamedEvent) else ("", event)
        )
        line = payload if payload.isascii() else payload.translate(_LINE_ENDS)
        await self._write(f"{name}data: {line}\n\n".encode())

    async def keep_alive(self) -> None:
        """Sends comments, which clients ignore, until cancelled or the client is gone."""
        with contextlib.suppress(ClientGoneError):
            while True:
                silent = self._clock() - self._sent_at
                if silent >= KEEP_ALIVE_SECONDS:
                    await self._write(b": keep-alive\n\n")
                else:
                    await asyncio.sleep(KEEP_ALIVE_SECONDS - silent)

    async def _write(self, body: bytes) -> None:
        await self._writes.wait(self._send({"type": "http.response.body", "body": body, "more_body": True}))
        self._sent_at = self._clock()


async def after_first(
    stream: AsyncIterator[_T], receive: Receive, patience_seconds: float | None = None
) -> AsyncIterator[_T]:
    """Waits for the first item, then returns the same stream: earlier errors still get an HTTP status.

    patience_seconds: how long to wait; after that an error is raised in place of the first item.

    Raises:
        ClientGoneError: the client left first.
    """
    first = asyncio.ensure_future(next_of(stream))
    try:
        await until_disconnect(receive, _done_or_late(first, patience_seconds))
        if first.done():
            first.result()  # raises the error, if there was one
    except BaseException:
        async with closing(stream):
            await end(first)
            raise
    return _Rejoined(first, stream)


async def _done_or_late(task: asyncio.Future[_T], seconds: float | None) -> None:
    await asyncio.wait({task}, timeout=seconds)


class _Rejoined(AsyncIterator[_T]):
    """The first item, then the rest. Not a generator: closing an unstarted one would not close the rest."""

    def __init__(self, first: asyncio.Future[_T], rest: AsyncIterator[_T]) -> None:
        self._first: asyncio.Future[_T] | None = first
        self._rest = rest

    async def __anext__(self) -> _T:
        if self._first is None:
            return await anext(self._rest)
        item = await self._first
        self._first = None
        return item

    async def aclose(self) -> None:
        async with closing(self._rest):
            if self._first is not None:
                await end(self._first)
