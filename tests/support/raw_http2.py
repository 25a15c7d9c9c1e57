"""An HTTP/2 client that leaves undone what gRPC's own always does: ending messages, reading answers."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

DATA, HEADERS, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 4, 6, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
INITIAL_WINDOW_SIZE = 4
_FRAME_BYTES = 16_384


@dataclass(slots=True)
class RawHttp2:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    ended: set[int] = field(default_factory=set)
    """Streams that the server has ended."""
    _window: int = 65_535
    _connection_room: int = 65_535
    _sent: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    _granted: dict[int, int] = field(default_factory=lambda: defaultdict(int))

    @classmethod
    @asynccontextmanager
    async def connect(cls, port: int, *, own_window: int = 65_535) -> AsyncIterator[RawHttp2]:
        client = cls(*await asyncio.open_connection("127.0.0.1", port))
        client.writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        client._frame(SETTINGS, 0, 0, INITIAL_WINDOW_SIZE.to_bytes(2) + own_window.to_bytes(4))
        try:
            yield client
        finally:
            client.writer.close()
            await client.writer.wait_closed()

    def open(self, stream: int, method: str, **metadata: str) -> None:
        fields = {
            ":method": "POST",
            ":scheme": "http",
            ":path": method,
            ":authority": "x",
            "content-type": "application/grpc",
            "te": "trailers",
            **metadata,
        }
        literal = b"".join(_literal(name, value) for name, value in fields.items())
        self._frame(HEADERS, END_HEADERS, stream, literal)

    def send_all(self, stream: int, data: bytes) -> None:
        """All that the stream ever has to say."""
        self._frame(DATA, END_STREAM, stream, data)

    def send_as_allowed(self, stream: int, total: int) -> int:
        """Sends a message of `total` bytes as far as flow control lets it, never all. Returns all sent."""
        while room := self._room(stream, total):
            begins = b"\0" + total.to_bytes(4) if not self._sent[stream] else b""
            part = begins + bytes(min(room, _FRAME_BYTES) - len(begins))
            self._frame(DATA, 0, stream, part)
            self._sent[stream] += len(part)
            self._connection_room -= len(part)
        return self._sent[stream]

    async def read_until_silence(self, seconds: float) -> None:
        """Handles what the server sends until it sends nothing for that long."""
        while True:
            try:
                async with asyncio.timeout(seconds):
                    head = await self.reader.readexactly(9)
            except TimeoutError:
                return
            body = await self.reader.readexactly(int.from_bytes(head[:3]))
            self._received(head[3], head[4], int.from_bytes(head[5:]), body)

    def _room(self, stream: int, total: int) -> int:
        stream_room = self._window + self._granted[stream] - self._sent[stream]
        room = min(stream_room, self._connection_room, total + 4 - self._sent[stream])
        return room if room > 5 else 0  # a message begins with five bytes

    def _received(self, kind: int, flags: int, stream: int, body: bytes) -> None:
        if kind in (DATA, HEADERS) and flags & END_STREAM:
            self.ended.add(stream)
        elif kind == SETTINGS and not flags & ACK:
            for at in range(0, len(body), 6):
                if int.from_bytes(body[at : at + 2]) == INITIAL_WINDOW_SIZE:
                    self._window = int.from_bytes(body[at + 2 : at + 6])
            self._frame(SETTINGS, ACK, 0, b"")
        elif kind == PING and not flags & ACK:
            self._frame(PING, ACK, 0, body)
        elif kind == WINDOW_UPDATE and stream:
            self._granted[stream] += int.from_bytes(body)
        elif kind == WINDOW_UPDATE:
            self._connection_room += int.from_bytes(body)

    def _frame(self, kind: int, flags: int, stream: int, body: bytes) -> None:
        self.writer.write(len(body).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + body)


def _literal(name: str, value: str) -> bytes:
    """A header in HPACK, neither compressed nor indexed. Both texts are shorter than 127 bytes."""
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
