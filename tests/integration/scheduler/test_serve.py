"""`serve` as a process runs it: real signals, warm-up, drain, exit."""

import asyncio
import gc
import os
import signal
from contextlib import aclosing

import pytest

from dspark_core.errors import CheckpointError, UnavailableError
from dspark_core.records import GenerateRequest
from services.common.channels import open_channel
from services.common.clients import VerifierClient
from services.common.options import ServerOptions
from services.common.server import GrpcServer, serve
from services.common.telemetry import Telemetry
from tests.support.faulty_verifier import FaultyVerifier
from tests.support.polling import eventually


@pytest.fixture
def servicer() -> FaultyVerifier:
    return FaultyVerifier()


@pytest.fixture
def server(servicer: FaultyVerifier) -> GrpcServer:
    options = ServerOptions(port=0, host="127.0.0.1", drain_seconds=60.0)
    return GrpcServer(options, [servicer.register], Telemetry(service="verifier"))


def _signal(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


async def test_it_is_ready_after_warm_up_only(server: GrpcServer):
    warmed = asyncio.Event()
    running = asyncio.create_task(serve(server, warm_up=warmed.wait))
    await eventually(lambda: server.port != 0)
    assert not server.ready
    assert gc.get_freeze_count() == 0
    warmed.set()
    await eventually(lambda: server.ready)
    assert gc.get_freeze_count() > 0
    _signal(signal.SIGTERM)
    async with asyncio.timeout(15):
        await running


async def test_a_signal_during_warm_up_ends_it(server: GrpcServer):
    running = asyncio.create_task(serve(server, warm_up=asyncio.Event().wait))
    await eventually(lambda: server.port != 0)
    _signal(signal.SIGTERM)
    async with asyncio.timeout(15):
        await running


async def test_a_failing_warm_up_is_raised(server: GrpcServer):
    async def warm_up() -> None:
        raise CheckpointError("model.safetensors lacks embed_tokens")

    with pytest.raises(CheckpointError, match="embed_tokens"):
        await serve(server, warm_up=warm_up)


async def test_calls_in_flight_finish_after_the_first_signal(server: GrpcServer, servicer: FaultyVerifier):
    hooks = []

    async def on_drain() -> None:
        hooks.append("drained")

    running = asyncio.create_task(serve(server, on_drain=on_drain))
    await eventually(lambda: server.ready)
    channel = open_channel(f"127.0.0.1:{server.port}")
    request = GenerateRequest(request_id="wait", prompt_token_ids=(1,))
    async with aclosing(VerifierClient(channel).generate(request, deadline_seconds=30)) as chunks:
        await anext(chunks)
        _signal(signal.SIGINT)
        await eventually(lambda: hooks == ["drained"])
        servicer.release.set()
        assert [chunk.token_ids async for chunk in chunks] == [(2,)]
    async with asyncio.timeout(15):
        await running
    await channel.close()


async def test_a_second_signal_does_not_wait_for_calls(server: GrpcServer, servicer: FaultyVerifier):
    running = asyncio.create_task(serve(server))
    await eventually(lambda: server.ready)
    channel = open_channel(f"127.0.0.1:{server.port}")
    request = GenerateRequest(request_id="wait", prompt_token_ids=(1,))
    async with aclosing(VerifierClient(channel).generate(request, deadline_seconds=30)) as chunks:
        await anext(chunks)
        _signal(signal.SIGTERM)
        await eventually(lambda: not server.ready)
        _signal(signal.SIGTERM)
        async with asyncio.timeout(15):  # far below the drain's 60 s
            await running
        with pytest.raises(UnavailableError):
            await anext(chunks)
    assert servicer.cancelled == 1
    await channel.close()
