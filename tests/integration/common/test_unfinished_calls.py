"""Clients that open calls and leave them open: others must be served, and memory must stay bounded."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from dspark_proto.v1 import verifier_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from services.common import interceptors, places, probes
from services.common.lifecycle import end
from services.common.options import ServerOptions
from services.common.reflection import enable_reflection
from services.common.server import GrpcServer
from services.common.telemetry import Telemetry
from tests.support.faulty_verifier import FaultyVerifier
from tests.support.polling import exhaust
from tests.support.raw_http2 import RawHttp2

CHECK = "/grpc.health.v1.Health/Check"
DESCRIBE = "/dspark.v1.VerifierService/Describe"
MEGABYTE = 2**20


@asynccontextmanager
async def running(**options) -> AsyncIterator[GrpcServer]:
    bound = ServerOptions(port=0, host="127.0.0.1", **options)
    server = GrpcServer(bound, [FaultyVerifier().register, enable_reflection], Telemetry(service="verifier"))
    await server.start()
    await server.mark_ready()
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def connected(server: GrpcServer) -> AsyncIterator[grpc.aio.Channel]:
    own = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=own) as channel:
        yield channel


async def served(channel: grpc.aio.Channel) -> bool:
    """Health and work."""
    health = health_pb2_grpc.HealthStub(channel)
    answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=20)
    await channel.unary_unary(DESCRIBE)(b"", timeout=20)
    return answer.status == health_pb2.HealthCheckResponse.SERVING


async def ending(call: grpc.aio.Call) -> tuple[grpc.StatusCode, str]:
    async with asyncio.timeout(15):
        return await call.code(), str(await call.details())


async def ending_of_watch(call: grpc.aio.UnaryStreamCall) -> grpc.StatusCode:
    """A client learns of the end only by reading."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await exhaust(call)
    return caught.value.code()


def unfinished(channel: grpc.aio.Channel) -> grpc.aio.StreamUnaryCall:
    """A call of a unary method whose request never comes."""
    return channel.stream_unary(DESCRIBE)()


async def test_watching_clients_do_not_shut_out_others() -> None:
    async with running(max_calls=2) as server, connected(server) as bad, connected(server) as good:
        stub = health_pb2_grpc.HealthStub(bad)
        oldest = stub.Watch(health_pb2.HealthCheckRequest())
        await anext(aiter(oldest))
        others = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(probes.MOST_PROBES)]
        assert await ending_of_watch(oldest) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not any(watch.done() for watch in others)
        assert await served(good)


async def test_open_reflection_does_not_shut_out_others() -> None:
    async with running(max_calls=2) as server, connected(server) as bad, connected(server) as good:
        stub = reflection_pb2_grpc.ServerReflectionStub(bad)
        calls = [stub.ServerReflectionInfo() for _ in range(probes.MOST_PROBES + 40)]
        ends = [asyncio.create_task(ending(call)) for call in calls]
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        assert done.pop().result()[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        newest = stub.ServerReflectionInfo()
        await newest.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        assert (await asyncio.wait_for(newest.read(), 15)).list_services_response.service
        assert await served(good)
        for one in ends:
            await end(one)


async def test_a_watch_ends_after_its_time(monkeypatch) -> None:
    monkeypatch.setattr(probes, "WATCH_SECONDS", 0.1)
    async with running() as server, connected(server) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert await ending_of_watch(watch) is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_unread_health_checks_do_not_pile_up() -> None:
    streams = range(1, 2 * 40, 2)
    async with (
        running() as server,
        connected(server) as good,
        RawHttp2.connect(server.port, own_window=0) as client,
    ):
        for stream in streams:
            client.open(stream, CHECK)
            client.send_all(stream, bytes(5))
            await client.read_until_silence(0.01)
        refused = len(streams) - probes.MOST_UNREAD_PROBES
        async with asyncio.timeout(15):
            while len(client.ended) < refused:
                await client.read_until_silence(0.05)
        await client.read_until_silence(0.3)
        assert len(client.ended) == refused
        assert await served(good)


async def test_unfinished_messages_hold_bounded_memory() -> None:
    streams = range(1, 2 * 20, 2)
    options = {"max_message_bytes": MEGABYTE, "max_arriving_bytes": 2 * MEGABYTE}
    async with running(**options) as server, RawHttp2.connect(server.port) as client:
        for stream in streams:
            client.open(stream, DESCRIBE)
        sent, total = -1, 0
        async with asyncio.timeout(15):
            while sent < total or total < 2 * MEGABYTE:
                sent = total
                await client.read_until_silence(0.2)
                total = sum(client.send_as_allowed(stream, MEGABYTE) for stream in streams)
        assert total <= 2 * MEGABYTE + len(streams) * 65_535


async def test_a_request_that_does_not_arrive_gives_its_place_to_the_next(monkeypatch) -> None:
    monkeypatch.setattr(interceptors, "MESSAGE_SECONDS", 0.3)
    async with running(max_arriving_bytes=1) as server, connected(server) as channel:
        late = unfinished(channel)
        await late.wait_for_connection()
        answer = await channel.unary_unary(
            DESCRIBE, response_deserializer=verifier_pb2.DescribeVerifierResponse.FromString
        )(b"", timeout=20)
        assert answer.model == "m"
        code, details = await ending(late)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "the arrival of a request did not end within 0.3 s" in details


async def test_a_request_does_not_wait_for_its_turn_for_ever(monkeypatch) -> None:
    monkeypatch.setattr(places, "TURN_SECONDS", 0.1)
    async with running(max_arriving_bytes=1) as server, connected(server) as channel:
        ends = [asyncio.create_task(ending(unfinished(channel))) for _ in range(2)]
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        code, details = done.pop().result()
        for one in ends:
            await end(one)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "too many calls at once before the arrival of a request" in details


async def test_a_call_without_a_request_is_the_callers_mistake() -> None:
    async with running() as server, connected(server) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="the call has no request") as caught:
            await channel.stream_unary(DESCRIBE)(iter(()), timeout=20)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
