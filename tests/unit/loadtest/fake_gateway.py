"""A small HTTP server that answers chats as the gateway does: server-sent events over chunked HTTP/1.1."""

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PIECES = 5
STALL_SECONDS = 30.0
STATS = {"rounds": 4, "drafted_tokens": 28, "accepted_tokens": 6, "accepted_length": 2.5}


class FakeGateway(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, behaviour: str, pause_seconds: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviour = behaviour
        self.pause_seconds = pause_seconds
        self.bodies: list[dict[str, object]] = []
        self.streams = itertools.count()
        self.never = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeGateway

    def do_GET(self) -> None:
        if self.server.behaviour == "keys":
            self._whole(401, {"error": {"message": "missing API key"}})
        elif self.server.behaviour == "no models":
            self._whole(200, {"data": []})
        else:
            self._whole(200, {"data": [{"id": "tiny-model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        if self.server.behaviour == "busy":
            self._whole(429, {"error": {"message": "queue full"}}, retry_after="0")
        elif self.server.behaviour == "refuse":
            self._whole(400, {"error": {"message": "no such thing"}})
        else:
            self._stream()

    def _stream(self) -> None:
        stalls = self.server.behaviour == "stall" and next(self.server.streams) > 0
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if self.server.behaviour == "odd":
            self._event({"choices": [None]})
        if self.server.behaviour == "bytes":
            self._chunk(b"data: \xff\n\n")
        for index in range(PIECES):
            if index == 2 and stalls:
                self.server.never.wait(STALL_SECONDS)
            if index:
                self.server.never.wait(self.server.pause_seconds)
            self._event({"choices": [{"delta": {"content": "word "}}]})
        if self.server.behaviour == "cut":
            self._chunk(b"")
            return
        self._event({"choices": [], "usage": {"completion_tokens": 11}, "speculation": STATS})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _event(self, value: dict[str, object]) -> None:
        self._chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _whole(self, status: int, value: dict[str, object], retry_after: str | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def serving(behaviour: str = "answer", pause_seconds: float = 0.005) -> Iterator[FakeGateway]:
    server = FakeGateway(behaviour, pause_seconds)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
