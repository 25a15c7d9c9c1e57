"""uvicorn's HTTP connection with bounds on what it does not bound: how long a request's head may take to
arrive, how large it may be, how much may stand around a body's chunks and behind the last one, and how long
the rest of a body may take that nobody waits for any more.
Bodies that are read have their own (`http_body.py`). Offers to go on in another protocol are declined.
Clients that speak HTTP/1.0, as some proxies do, get no chunks.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

if TYPE_CHECKING:
    from uvicorn._types import ASGISendEvent

HEAD_TIMEOUT_SECONDS = 30.0
"""From the connection, or from a later request's first byte, to the end of its headers."""
REST_SECONDS = 5.0
"""From an answer to the end of its request's body, which is no longer read. The connection is not closed at
once: a client that is still sending would lose the answer with it."""
MAX_HEAD_BYTES = 65536
"""Of request line and headers, and of what a body has that is no content: sizes and extensions of chunks,
and fields behind the last one, which are ignored. They are looked at after every read, so they
may be larger by one of those."""


class _UnframedCycle(RequestResponseCycle):
    """For a client of HTTP/1.0, to which a body without a length ends with the connection."""

    _unframed = False

    async def send(self, message: ASGISendEvent) -> None:
        if message["type"] == "http.response.start":
            if not any(name.lower() == b"content-length" for name, _ in message.get("headers", ())):
                self.chunked_encoding, self._unframed = False, True
        elif message["type"] == "http.response.body" and self._unframed:
            self.expected_content_length = len(message.get("body", b""))  # uvicorn would demand a length
        await super().send(message)


class BoundedHttpProtocol(HttpToolsProtocol):
    _in_head = False
    _head_bytes = 0
    """Received of a head, or since the last content of a body."""
    _head_timer: asyncio.TimerHandle | None = None
    _in_body = False
    _content_came = False
    """Of a body, in what is being read."""
    _rest_timer: asyncio.TimerHandle | None = None
    _offered = False
    """Whether the latest head offers to upgrade to another protocol."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_begins()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_ends()
        self._body_ends()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        in_head, in_body = self._in_head, self._in_body
        self._content_came = False
        self._unset_keepalive_if_required()
        try:
            self._read(data)
        except httptools.HttpParserError:
            message = "Invalid HTTP request received."
            self.logger.warning(message)
            self.send_400_response(message)
            return
        if (in_head and self._in_head) or (in_body and self._in_body and not self._content_came):
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._head_ends()
                self.send_400_response(f"The request's headers are larger than {MAX_HEAD_BYTES} bytes.")

    def _read(self, data: bytes) -> None:
        """Parses data, ignoring upgrade offers: clients that offer HTTP/2 (as Java's does in every first
        request) or WebSockets then continue in HTTP/1.1. httptools takes what follows such a head, even a
        body, for the other protocol's data, so it is given the head again without the offer."""
        rest = memoryview(data)
        while rest:
            try:
                self.parser.feed_data(rest)
                return
            except httptools.HttpParserUpgrade as end_of_head:
                if not self._offered:
                    return
                rest = rest[end_of_head.args[0] :]
                head = self._head_without_offer()
                self.parser = _new_parser(self)  # the old one skips what follows the last of a connection
                self.parser.feed_data(head)

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] != b"upgrade"]
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if not self._in_head:
            self._head_begins()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body:  # what a proxy in front has let pass behind a body must not count as a header
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head_ends()
        # httptools also reports an upgrade for CONNECT, which offers none.
        self._offered = self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"
        if self._offered:
            return
        self._in_body, self._head_bytes = True, 0
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            self.cycle.__class__ = _UnframedCycle  # uvicorn has no setting for it; it sends nothing before

    def on_body(self, body: bytes) -> None:
        self._content_came, self._head_bytes = True, 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._offered:
            return
        self._body_ends()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # With pipelined requests the newest is being read, so the answer to that one counts.
        if self._in_body and self.cycle.response_complete and self._rest_timer is None:
            self._rest_timer = self.loop.call_later(REST_SECONDS, self._close)

    def _body_ends(self) -> None:
        self._in_body = False
        if self._rest_timer is not None:
            self._rest_timer.cancel()
            self._rest_timer = None

    def _head_begins(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._wait_for_head()

    def _wait_for_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_SECONDS, self._head_is_late)

    def _head_ends(self) -> None:
        self._in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._wait_for_head()  # pipelined: the previous request is still being answered
            return
        self._head_ends()
        self._close()

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


def _new_parser(protocol: HttpToolsProtocol) -> httptools.HttpRequestParser:
    """A parser configured as uvicorn does it."""
    parser = httptools.HttpRequestParser(protocol)
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser
