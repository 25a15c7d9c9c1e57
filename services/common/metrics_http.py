"""The plain HTTP port of a service: `/metrics` for Prometheus, `/healthz` and `/readyz` for people.

The gateway serves the same paths itself; this is for services that otherwise speak only gRPC.
"""

from __future__ import annotations

import errno
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from dspark_core.errors import ConfigError
from services.common.addresses import address_of, bound_socket

_log = logging.getLogger(__name__)

_FULL_SECONDS = 0.1
"""Until the next attempt to accept a connection while the process or the system can open no more files."""


class MetricsServer:
    """Serves until `close`, on threads of its own. Port 0 binds a free one."""

    def __init__(
        self,
        *,
        registry: CollectorRegistry,
        ready: Callable[[], bool],
        port: int,
        host: str = "0.0.0.0",
        details: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        """`details`: lines about current problems, shown by /readyz."""
        try:
            self._http = _server(host, port, _handler(registry, ready, details))
        except OSError as error:
            raise ConfigError(f"cannot listen on {address_of(host, port)} for metrics: {error}") from error
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, name="metrics-http", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        return self._http.server_port

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def _server(host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    class Server(ThreadingHTTPServer):
        def server_bind(self) -> None:
            self.socket.close()
            self.socket = bound_socket(host, port)
            self.server_name, self.server_port = host, self.socket.getsockname()[1]

        def get_request(self) -> tuple[socket.socket, object]:
            try:
                return super().get_request()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    time.sleep(_FULL_SECONDS)  # the connection keeps waiting, and would be tried at once
                raise

        def handle_error(self, request: object, client_address: object) -> None:
            """Called in an except block. Clients may hang up, or stop reading."""
            if not isinstance(sys.exception(), ConnectionError | TimeoutError):
                _log.exception("a request from %s failed", client_address)

    return Server((host, port), handler)


def _handler(
    registry: CollectorRegistry, ready: Callable[[], bool], details: Callable[[], Sequence[str]]
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10  # seconds a silent client may hold a thread

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/metrics":
                encode, content_type = choose_encoder(self.headers.get("Accept", ""))
                self._reply(HTTPStatus.OK, encode(registry), content_type)
            elif path == "/healthz":
                self._reply(HTTPStatus.OK, b"ok\n")
            elif path == "/readyz":
                is_ready = ready()
                status = HTTPStatus.OK if is_ready else HTTPStatus.SERVICE_UNAVAILABLE
                lines = ["ready" if is_ready else "not ready", *details()]
                self._reply(status, "".join(f"{line}\n" for line in lines).encode())
            else:
                self._reply(HTTPStatus.NOT_FOUND, b"not found\n")

        def _reply(self, status: HTTPStatus, body: bytes, content_type: str = "text/plain") -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
            """Logs nothing: scrapes every few seconds would flood the log."""

    return Handler
