"""A client that does not read its stream."""

import asyncio

import grpc
import grpc.aio
import pytest
from dspark_proto.v1 import gateway_pb2, gateway_pb2_grpc

from services.common import interceptors
from services.gateway.servicer import GatewayServicer
from tests.integration.gateway.conftest import Serve
from tests.support.fake_generation import FakeBackend
from tests.support.loop_clock import LoopClock
from tests.support.polling import eventually

LONG = gateway_pb2.GatewayGenerateRequest(prompt="p", top_logprobs=20, n=2)
FEW_BYTES = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]


async def read_all(call: grpc.aio.UnaryStreamCall) -> list[str]:
    texts = []
    async with asyncio.timeout(15):
        while (chunk := await call.read()) is not grpc.aio.EOF:
            texts.append(chunk.text)
    return texts


async def test_whoever_does_not_read_loses_the_places(serve: Serve, monkeypatch) -> None:
    monkeypatch.setattr(GatewayServicer.Generate, "write_limit_seconds", 0.2)
    monkeypatch.setattr(interceptors, "ABORT_SECONDS", 0.05)
    backend = FakeBackend("x" * 100_000, max_context_tokens=200_000)
    running = await serve(backend)
    address = f"127.0.0.1:{running.grpc_server.port}"
    async with grpc.aio.insecure_channel(address, options=FEW_BYTES) as channel:
        call = gateway_pb2_grpc.GatewayServiceStub(channel).Generate(LONG)
        await call.read()
        await eventually(lambda: backend.cancelled == 2)
        assert running.gateway.admission.running == 0
        ended = (
            'dspark_rpc_requests_total{code="DEADLINE_EXCEEDED",method="/dspark.v1.GatewayService/Generate"}'
        )
        async with asyncio.timeout(
            10
        ):  # the call ends on the server although its client only learns of it by reading
            while ended not in (await running.client.get("/metrics")).text:
                await asyncio.sleep(0.01)
        with pytest.raises(grpc.aio.AioRpcError, match=r"the client read nothing for 0\.2 s") as caught:
            await read_all(call)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_whoever_reads_may_wait_for_tokens(serve: Serve) -> None:
    clock = LoopClock()
    backend = FakeBackend("abcdef")
    backend.hold_after_chunks = 1
    running = await serve(backend)
    call = running.stub.Generate(gateway_pb2.GatewayGenerateRequest(prompt="p"), timeout=20)
    await call.read()
    await asyncio.sleep(0.02)  # until the server knows that it was read
    await clock.advance(4 * GatewayServicer.Generate.write_limit_seconds)
    await clock.advance(0)
    backend.release.set()
    assert await read_all(call) == ["def", ""]
