"""A drafter in its own process behind a relay that delays traffic to simulate network distance."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from dspark_core.engine.protocols import DraftGeometry
from services.common.channels import open_channel
from services.embedded.processes import LOOPBACK, ServiceProcess, free_ports
from services.verifier.clients import RemoteDraftSource

START_SECONDS = 120.0
CHUNK_BYTES = 1 << 16

_T = TypeVar("_T")


class Delay:
    """A TCP relay that forwards everything `seconds` after it arrived."""

    def __init__(self, port: int) -> None:
        self.seconds = 0.0
        self._port = port
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self) -> int:
        """-> the port to connect to instead."""
        server = await asyncio.start_server(self._serve, LOOPBACK, 0)
        return int(server.sockets[0].getsockname()[1])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(LOOPBACK, self._port)
        for source, sink in ((reader, there_writer), (there_reader, writer)):
            task = asyncio.create_task(self._relay(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop, underway = asyncio.get_running_loop(), asyncio.Queue[tuple[float, bytes]]()

        async def hand_on() -> None:
            while True:
                due, data = await underway.get()
                await asyncio.sleep(max(due - loop.time(), 0.0))
                writer.write(data)

        handing = asyncio.create_task(hand_on())
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(CHUNK_BYTES):
                underway.put_nowait((loop.time() + self.seconds, data))
        handing.cancel()
        writer.close()


class FarDrafter:
    """Starts the process, and runs the verifier's end of the stream on its own thread."""

    def __init__(self, geometry: DraftGeometry, environ: Mapping[str, str]) -> None:
        (port,) = free_ports(1)
        self._process = ServiceProcess("drafter", {**environ, "DSPARK_PORT": str(port)}, port)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="draft-stream", daemon=True).start()
        self._delay = Delay(port)
        self.source = self._run(self._connect(geometry))

    def move(self, round_trip_seconds: float) -> None:
        self._delay.seconds = round_trip_seconds / 2

    def close(self) -> None:
        self._run(self.source.close())
        self._run(self._process.stop(START_SECONDS))

    async def _connect(self, geometry: DraftGeometry) -> RemoteDraftSource:
        await self._process.wait_serving(START_SECONDS)
        port = await self._delay.listen()
        source = RemoteDraftSource(open_channel(f"{LOOPBACK}:{port}"), geometry)
        source.start()
        await asyncio.wait_for(source.wait_connected(), START_SECONDS)
        return source

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(START_SECONDS)
