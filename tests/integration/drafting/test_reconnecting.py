"""How soon a verifier comes back after its stream to the drafter broke."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import statistics
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
from tests.support.ports import free_ports

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
    # Four times as long if they were opened ever more rarely; a busy machine may hold up one or two.
    assert statistics.median(await gaps(lasting_seconds=0.3)) < 0.35


async def test_streams_that_break_at_once_are_opened_ever_more_rarely() -> None:
    assert (await gaps(lasting_seconds=0.0))[-1] > 1.2


@contextlib.asynccontextmanager
async def idle_drafter(port: int = 0, **options: Any) -> AsyncIterator[GrpcServer]:
    """Ends in order, its streams first."""
    engine: Any = Idle()
    telemetry = Telemetry(service="drafter")
    servicer = DrafterServicer(engine, telemetry)
    server = GrpcServer(ServerOptions(port=port, host="127.0.0.1", **options), [servicer.register], telemetry)
    await server.start()
    try:
        yield server
    finally:
        await server.drain(servicer.drain)
        await server.stop()
        servicer.close()


async def test_connections_that_reach_their_age_are_no_cause_for_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(clients, "STEADY_SECONDS", 0.2)
    caplog.set_level(logging.INFO, logger=clients.__name__)
    drafter = idle_drafter(max_connection_seconds=0.3)
    async with drafter as server, open_channel(f"127.0.0.1:{server.port}") as channel:
        source = clients.RemoteDraftSource(channel, GEOMETRY)
        source.start()
        await eventually(lambda: caplog.messages.count("connected to the drafter") >= 3)
        assert {record.levelname for record in caplog.records} == {"INFO"}
        await server.stop()
        await eventually(lambda: "WARNING" in {record.levelname for record in caplog.records})
        assert source.problem is not None
        await source.close()


async def test_why_there_are_no_drafts_is_told_again_when_it_changes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And once per reason: a verifier tries again every second or two."""
    (port,) = free_ports(1)
    async with open_channel(f"127.0.0.1:{port}") as channel:
        other = dataclasses.replace(GEOMETRY, fingerprint="another model's")
        source = clients.RemoteDraftSource(channel, other)
        source.start()
        await eventually(lambda: "refused" in caplog.text)
        async with idle_drafter(port):
            await eventually(lambda: "the drafter serves" in caplog.text)
            assert source.problem
            assert source.problem.startswith("the drafter serves")
        await eventually(lambda: "refused" in (source.problem or ""))
        await source.close()
    assert len(caplog.messages) == 2


async def test_every_outage_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also after a drafter that ended its streams in order, as one that is stopped does."""
    monkeypatch.setattr(clients, "STEADY_SECONDS", 0.0)
    (port,) = free_ports(1)
    async with open_channel(f"127.0.0.1:{port}") as channel:
        source = clients.RemoteDraftSource(channel, GEOMETRY)
        source.start()
        for outages in (1, 2):
            await eventually(lambda told=outages: len(caplog.messages) == told)
            async with idle_drafter(port) as drafter:
                await source.wait_connected()
                await eventually(lambda server=drafter: server.in_flight == 1)
        await eventually(lambda: len(caplog.messages) == 3)
        await source.close()
    assert {message.split(":")[0] for message in caplog.messages} == {"no drafter"}


def readers_of_requests() -> list[str]:
    names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
    return [name for name in names if "request_iterator" in name]


async def test_streams_that_broke_leave_no_reader_of_their_requests() -> None:
    """Collected while it waits, each is an error in the log."""
    async with idle_drafter() as server, open_channel(f"127.0.0.1:{server.port}") as channel:
        source = clients.RemoteDraftSource(channel, GEOMETRY)
        source.start()
        await source.wait_connected()
        await eventually(lambda: bool(readers_of_requests()))
        await server.stop()
        await eventually(lambda: not source.connected)
        await eventually(lambda: not readers_of_requests())
        await source.close()
