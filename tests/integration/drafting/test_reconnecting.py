"""How soon a verifier comes back after its stream to the drafter broke."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest
from dspark_proto.v1 import drafter_pb2

from dspark_core.engine.protocols import DraftGeometry
from dspark_core.errors import UnavailableError
from services.common.channels import open_channel
from services.common.options import ServerOptions
from services.common.server import GrpcServer
from services.common.telemetry import Telemetry
from services.drafter.servicer import DrafterServicer
from services.verifier import clients
from tests.support.polling import eventually

GEOMETRY = DraftGeometry(
    fingerprint="tiny", block_size=4, feature_size=64, vocab_size=512, context_window=None
)
ROTATIONS = 5


class Idle:
    geometry = GEOMETRY
    num_sequences = 0

    def release(self, sequence_ids: list[str]) -> None: ...


class Breaking(DrafterServicer):
    """Its streams end in an error after a while."""

    def __init__(self, lasting_seconds: float, telemetry: Telemetry) -> None:
        engine: Any = Idle()
        super().__init__(engine, telemetry)
        self.lasting_seconds = lasting_seconds
        self.opened: list[float] = []

    async def Draft(self, request_iterator: Any, context: Any) -> AsyncIterator[drafter_pb2.DraftResponse]:  # noqa: N802
        self.opened.append(asyncio.get_running_loop().time())
        await asyncio.sleep(self.lasting_seconds)
        raise UnavailableError("its time is over")
        yield


async def gaps(lasting_seconds: float) -> list[float]:
    """Between one stream's end and the next one."""
    telemetry = Telemetry(service="drafter")
    servicer = Breaking(lasting_seconds, telemetry)
    server = GrpcServer(ServerOptions(port=0, host="127.0.0.1"), [servicer.register], telemetry)
    await server.start()
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        source = clients.RemoteDraftSource(channel, GEOMETRY)
        source.start()
        await eventually(lambda: len(servicer.opened) > ROTATIONS)
        await source.close()
    await server.stop()
    servicer.close()
    pairs = itertools.pairwise(servicer.opened[: ROTATIONS + 1])
    return [after - before - lasting_seconds for before, after in pairs]


async def test_good_streams_that_break_are_opened_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drafter's connections end at an age, each stream in an error: every time, not just the first."""
    monkeypatch.setattr(clients, "STEADY_SECONDS", 0.2)
    assert max(await gaps(lasting_seconds=0.3)) < 0.6


async def test_streams_that_break_at_once_are_opened_ever_more_rarely() -> None:
    assert (await gaps(lasting_seconds=0.0))[-1] > 1.2


def readers_of_requests() -> list[str]:
    names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
    return [name for name in names if "request_iterator" in name]


async def test_streams_that_broke_leave_no_reader_of_their_requests() -> None:
    """Collected while it waits, each is an error in the log."""
    engine: Any = Idle()
    telemetry = Telemetry(service="drafter")
    servicer = DrafterServicer(engine, telemetry)
    server = GrpcServer(ServerOptions(port=0, host="127.0.0.1"), [servicer.register], telemetry)
    await server.start()
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        source = clients.RemoteDraftSource(channel, GEOMETRY)
        source.start()
        await source.wait_connected()
        await eventually(lambda: bool(readers_of_requests()))
        await server.stop()
        await eventually(lambda: not source.connected)
        await eventually(lambda: not readers_of_requests())
        await source.close()
    servicer.close()
