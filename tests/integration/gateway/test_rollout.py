"""A gateway that ends while another serves: clients move there, and none of their requests fails."""

import asyncio
import time

import grpc.aio
import pytest
from dspark_proto.v1 import gateway_pb2_grpc

from tests.integration.gateway.conftest import MODEL, Serve
from tests.integration.gateway.test_grpc_generate import request
from tests.support.fake_generation import FakeBackend

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


async def test_a_gateway_that_lingers_closes_each_connection_after_its_answer(serve: Serve) -> None:
    running = await serve(FakeBackend("ok"))
    assert "connection" not in (await running.client.get("/healthz")).headers
    lingers = asyncio.create_task(running.http.linger(120))
    await asyncio.sleep(0)
    answer = await running.client.post("/v1/chat/completions", json=CHAT)
    assert (answer.status_code, answer.headers["connection"]) == (200, "close")
    await asyncio.wait_for(lingers, 15)  # returns early: no connection is open any more


async def test_connections_that_stay_idle_are_closed_at_the_end(serve: Serve) -> None:
    backend = FakeBackend("abcdef")
    backend.hold_after_chunks = 1
    running = await serve(backend)
    idle, writer = await asyncio.open_connection("127.0.0.1", running.http.port)
    asked = asyncio.create_task(running.client.post("/v1/chat/completions", json=CHAT))
    while backend.running == 0:
        await asyncio.sleep(0.01)
    started = time.monotonic()
    await running.http.linger(0.3)
    assert time.monotonic() - started >= 0.3
    assert await asyncio.wait_for(idle.read(), 15) == b""
    writer.close()
    await writer.wait_closed()
    backend.release.set()
    assert (await asked).status_code == 200


async def _outcome(stub: gateway_pb2_grpc.GatewayServiceStub) -> str | grpc.StatusCode:
    """The text, or the status code if there is none."""
    try:
        return "".join([chunk.text async for chunk in stub.Generate(request(), timeout=20)])
    except grpc.aio.AioRpcError as error:
        return error.code()


async def test_grpc_clients_call_the_next_gateway_while_a_stream_ends_at_the_first(serve: Serve) -> None:
    held = FakeBackend("first")
    held.hold_after_chunks = 1
    first, second = await serve(held), await serve(FakeBackend("second"))
    addresses = ",".join(f"127.0.0.1:{one.grpc_server.port}" for one in (first, second))
    async with grpc.aio.insecure_channel(f"ipv4:{addresses}") as channel:
        stub = gateway_pb2_grpc.GatewayServiceStub(channel)
        stream = stub.Generate(request(), timeout=20)
        chunks = aiter(stream)
        text = (await anext(chunks)).text
        first.grpc_server.send_away()
        outcomes = [await _outcome(stub) for _ in range(20)]
        # gRPC may cancel calls that arrive at that very moment, but none after the first one answered.
        answered = outcomes[outcomes.index("second") :]
        assert answered == ["second"] * len(answered)
        assert {*outcomes[: -len(answered)]} <= {grpc.StatusCode.CANCELLED}
        held.release.set()
        assert text + "".join([chunk.text async for chunk in chunks]) == "first"


@pytest.mark.parametrize("times", [1, 2])
async def test_stopping_does_not_wait_for_those_sent_away(serve: Serve, times: int) -> None:
    backend = FakeBackend("abcdef")
    backend.hold_after_chunks = 1
    running = await serve(backend)
    stream = running.stub.Generate(request(), timeout=20)
    await stream.read()
    for _ in range(times):
        running.grpc_server.send_away()
    started = time.monotonic()
    await running.grpc_server.stop()
    assert time.monotonic() - started < 15  # the drain would take 20 s
    with pytest.raises(grpc.aio.AioRpcError):
        await stream.read()
