"""Runs the REST app on an existing event loop, that of a service's main or of the embedded stack."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dspark_core.errors import ConfigError
from services.common.addresses import address_of, bound_socket
from services.gateway.admission import Admission
from services.gateway.http.protocol import BoundedHttpProtocol

_log = logging.getLogger(__name__)

_BACKLOG = 1024
"""Connections the operating system queues until they are accepted."""
_POLL_SECONDS = 0.05
LOST_SECONDS = 60
"""A client that takes no data for this long is cut off, and so is one whose machine no longer answers: its
connection would stay open for ever, even if the server has closed it."""
_PROBE_SECONDS = 15
"""How often the system asks a silent client's machine whether the connection still exists."""


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to the process."""
        yield


class HttpServer:
    def __init__(
        self, app: ASGIApp, admission: Admission, *, host: str, port: int, keep_alive_seconds: int
    ) -> None:
        """port: 0 picks a free one. keep_alive_seconds: how long an idle connection stays open."""
        self._app = app
        self._admission = admission
        self._host = host
        self._port = port
        self._keep_alive_seconds = keep_alive_seconds
        self._server: _Uvicorn | None = None
        self._task: asyncio.Task[None] | None = None
        self._leaving = False

    @property
    def port(self) -> int:
        return self._port

    async def start(self) -> int:
        """Starts serving and returns the port. Raises ConfigError if the port is taken."""
        listener = _bind(self._host, self._port)
        self._port = listener.getsockname()[1]
        config = uvicorn.Config(
            self._answer,
            interface="asgi3",
            http=BoundedHttpProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=self._keep_alive_seconds,
            timeout_graceful_shutdown=1,
            # asyncio accepts up to this many connections at a time; once the process is out of file
            # descriptors, it logs that many tracebacks every second, which is megabytes with a long backlog.
            backlog=1,
        )
        self._server = _Uvicorn(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]), name="http")
        while not self._server.started:
            if self._task.done():
                self._task.result()
                raise ConfigError(f"the HTTP server on {self._host}:{self._port} ended at once")
            await asyncio.sleep(0.005)  # uvicorn has no event for it
        listener.listen(_BACKLOG)  # asyncio has set it to the backlog above
        return self._port

    async def linger(self, seconds: float) -> None:
        """Keeps serving for this long, but closes each connection after its next response.

        Clients keep connections open and cannot know that this gateway is ending; refusing their next request
        would be an error to them. Returns early once no connection is open; closes idle ones when the time is
        up.
        """
        if self._server is None:
            return
        self._leaving = True
        connections = self._server.server_state.connections
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while connections:
                    await asyncio.sleep(_POLL_SECONDS)
        for connection in tuple(connections):
            connection.shutdown()

    async def drain(self, seconds: float) -> bool:
        """Refuses new requests with 503 and lets the others finish. Returns False if some did not in time;
        these are answered with an error."""
        self._admission.drain()
        idle = await self._admission.wait_idle(seconds)
        if not idle:
            _log.warning("%d requests still ran after %g s of draining", self._admission.running, seconds)
            self._admission.shut()
        return idle

    async def stop(self) -> None:
        """Closes the port. Requests still running end with an error, or are cancelled if the client does not
        read it. Safe to call twice."""
        if self._server is None or self._task is None:
            return
        self._admission.shut()
        self._server.should_exit = True
        task, self._task, self._server = self._task, None, None
        await task

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        await self._app(scope, receive, send_last if self._leaving else send)


def _bind(host: str, port: int) -> socket.socket:
    with contextlib.ExitStack() as on_error:
        try:
            listener = on_error.enter_context(bound_socket(host, port))
            listener.listen(_BACKLOG)
        except OSError as error:
            raise ConfigError(f"cannot listen on {address_of(host, port)}: {error}") from error
        on_error.pop_all()
    listener.setblocking(False)
    _notice_lost_clients(listener)
    return listener


def _notice_lost_clients(listener: socket.socket) -> None:
    """On Linux, where connections inherit these options from the socket that accepts them."""
    if sys.platform != "linux":
        return
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_SECONDS)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_SECONDS)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, LOST_SECONDS * 1000)
