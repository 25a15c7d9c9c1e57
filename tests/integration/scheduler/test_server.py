"""The common server through real gRPC: errors, limits, deadlines, health, drain, cancellation."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import grpc
import grpc.aio
import pytest
from dspark_proto.v1 import verifier_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dspark_core.errors import ConfigError, DeadlineError, DSparkError, QueueFullError, UnavailableError
from dspark_core.records import GenerateRequest
from services.common.channels import open_channel
from services.common.clients import VerifierClient
from services.common.options import ServerOptions
from services.common.server import GrpcServer
from services.common.telemetry import Telemetry
from tests.support.faulty_verifier import ERRORS, FaultyVerifier
from tests.support.loop_clock import LoopClock
from tests.support.polling import eventually, exhaust

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def _request(request_id: str) -> GenerateRequest:
    return GenerateRequest(request_id=request_id, prompt_token_ids=(1,))


class Stack:
    """A server, the servicer behind it and a channel to it."""

    def __init__(self, apart: dict[str, int] | None = None, **options) -> None:
        self.servicer = FaultyVerifier()
        self.telemetry = Telemetry(service="verifier")
        self.server = GrpcServer(
            ServerOptions(**{"port": 0, "host": "127.0.0.1", "drain_seconds": 5.0, **options}),
            [self.servicer.register],
            self.telemetry,
            apart=apart,
        )

    async def open(self) -> None:
        await self.server.start()
        self.channel = open_channel(f"127.0.0.1:{self.server.port}")
        self.client = VerifierClient(self.channel, timeout_seconds=30.0)

    async def close(self) -> None:
        await self.channel.close()
        await self.server.stop()

    async def health(self, service: str = "") -> int:
        stub = health_pb2_grpc.HealthStub(self.channel)
        return (await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)).status

    def generate(self, request_id: str):
        request = _request(request_id)
        return aclosing(self.client.generate(request, deadline_seconds=30.0))

    def calls(self, method: str, code: str) -> float | None:
        labels = {"method": f"/dspark.v1.VerifierService/{method}", "code": code}
        return self.telemetry.registry.get_sample_value("dspark_rpc_requests_total", labels)


@asynccontextmanager
async def _stack(**options) -> AsyncIterator[Stack]:
    stack = Stack(**options)
    await stack.open()
    try:
        yield stack
    finally:
        await stack.close()


async def _describe_until_refused(client: VerifierClient) -> None:
    while True:
        await client.describe()


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    async with _stack() as stack:
        await stack.server.mark_ready()
        yield stack


@pytest.mark.parametrize("kind", [kind for kind, error in ERRORS.items() if isinstance(error, DSparkError)])
async def test_unary_and_streaming_calls_raise_what_the_server_raised(stack: Stack, kind: str):
    expected = ERRORS[kind]
    stack.servicer.describe_error = expected
    with pytest.raises(type(expected)) as unary:
        await stack.client.describe()
    async with stack.generate(kind) as chunks:
        assert (await anext(chunks)).token_ids == (1,)
        with pytest.raises(type(expected)) as streaming:
            await anext(chunks)
    for caught in (unary.value, streaming.value):
        assert type(caught) is type(expected)
        assert str(caught) == str(expected)
        for detail in ("field", "retry_after_seconds"):
            assert getattr(caught, detail, None) == getattr(expected, detail, None)


async def test_an_unexpected_error_is_logged_and_not_shown(stack: Stack, caplog: pytest.LogCaptureFixture):
    stack.servicer.describe_error = ERRORS["bug"]
    with (
        caplog.at_level(logging.ERROR, "services.common.interceptors"),
        pytest.raises(DSparkError) as caught,
    ):
        await stack.client.describe()
    assert "secret" not in str(caught.value)
    reference = str(caught.value).split()[-1]
    record = next(record for record in caplog.records if reference in record.getMessage())
    assert record.exc_info is not None
    assert record.exc_info[1] is ERRORS["bug"]
    # The status is on its way to the client before the call is counted.
    await eventually(lambda: stack.calls("Describe", "INTERNAL") == 1)


async def test_calls_are_counted_by_method_and_status(stack: Stack):
    await stack.client.describe()
    async with stack.generate("fine") as chunks:
        assert [chunk.token_ids async for chunk in chunks] == [(1,), (2,)]
    assert stack.calls("Describe", "OK") == 1
    assert stack.calls("Generate", "OK") == 1
    assert stack.server.in_flight == 0


@pytest.mark.parametrize("request_id", ["wait", "flood"])
async def test_closing_the_iterator_ends_the_handler(stack: Stack, request_id: str):
    """Also while the handler is stuck writing to a client that does not read."""
    async with stack.generate(request_id) as chunks:
        await anext(chunks)
        assert stack.servicer.running == 1
    await eventually(lambda: stack.servicer.running == 0 and stack.server.in_flight == 0)
    await eventually(lambda: stack.calls("Generate", "CANCELLED") == 1)


async def _describe(channel: grpc.aio.Channel) -> verifier_pb2.DescribeVerifierResponse:
    """A call without a deadline of its own."""
    call = channel.unary_unary(
        "/dspark.v1.VerifierService/Describe",
        request_serializer=verifier_pb2.DescribeVerifierRequest.SerializeToString,
        response_deserializer=verifier_pb2.DescribeVerifierResponse.FromString,
    )
    return await call(verifier_pb2.DescribeVerifierRequest())


@pytest.mark.parametrize("method", ["Describe", "Generate"])
async def test_a_message_that_cannot_be_parsed_is_the_callers_mistake(
    stack: Stack, method: str, caplog: pytest.LogCaptureFixture
):
    async with grpc.aio.insecure_channel(f"127.0.0.1:{stack.server.port}") as channel:
        call = channel.unary_unary(f"/dspark.v1.VerifierService/{method}")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"\xff\xff\xff", timeout=20)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "malformed request: Error parsing message with type 'dspark.v1." in (caught.value.details() or "")
    await eventually(lambda: stack.calls(method, "INVALID_ARGUMENT") == 1)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_unary_calls_without_a_deadline_get_the_servers():
    async with _stack(unary_timeout_seconds=0.05) as stack:
        stack.servicer.describe_hangs = True
        # A plain channel, as a foreign client would open it: ours always sends a deadline.
        async with grpc.aio.insecure_channel(f"127.0.0.1:{stack.server.port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await _describe(channel)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "0.05 s" in (caught.value.details() or "")


async def test_our_channels_never_wait_for_ever(stack: Stack):
    stack.servicer.describe_hangs = True
    channel = open_channel(f"127.0.0.1:{stack.server.port}", timeout_seconds=0.05)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _describe(channel)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await channel.close()


async def test_a_clients_deadline_ends_a_stream(stack: Stack):
    request = _request("wait")
    with pytest.raises(DeadlineError):
        await exhaust(stack.client.generate(request, deadline_seconds=0.1))
    await eventually(lambda: stack.servicer.running == 0)


async def test_connections_end_after_their_time_streams_included():
    async with _stack(max_connection_seconds=0.5) as stack:
        async with stack.generate("wait") as chunks:
            with pytest.raises(UnavailableError):
                await exhaust(chunks)
        await eventually(lambda: stack.servicer.running == 0)
        assert (await stack.client.describe()).model == "m"


async def test_an_address_of_ipv6_may_be_listened_on():
    server = GrpcServer(ServerOptions(port=0, host="::1"), [], Telemetry(service="six"))
    port = await server.start()
    async with grpc.aio.insecure_channel(f"[::1]:{port}") as channel:
        await asyncio.wait_for(channel.channel_ready(), 15)
    await server.stop()


async def test_more_calls_than_allowed_are_refused_but_health_is_not():
    async with _stack(max_calls=2) as stack:
        await stack.server.mark_ready()
        async with stack.generate("wait") as one, stack.generate("wait") as two:
            await anext(one)
            await anext(two)
            with pytest.raises(QueueFullError, match="2 calls are already in flight"):
                await stack.client.describe()
            assert await stack.health() == SERVING
        await eventually(lambda: stack.server.in_flight == 0)
        assert (await stack.client.describe()).model == "m"


async def test_a_method_that_counts_apart_has_a_bound_of_its_own_and_keeps_no_other_out():
    async with _stack(max_calls=1, apart={"/dspark.v1.VerifierService/Generate": 2}) as stack:
        async with (
            stack.generate("wait") as one,
            stack.generate("wait") as two,
            stack.generate("wait") as three,
        ):
            await anext(one)
            await anext(two)
            with pytest.raises(QueueFullError, match="Generate refused: 2 calls of it are already in flight"):
                await anext(three)
            assert (await stack.client.describe()).model == "m"
        await eventually(lambda: stack.server.in_flight == 0)
        async with stack.generate("wait") as one:
            await anext(one)


@pytest.mark.parametrize("service", ["", "dspark.v1.VerifierService"])
async def test_health_follows_warm_up_and_drain(service: str):
    async with _stack() as stack:
        assert await stack.health(service) == NOT_SERVING
        await stack.server.mark_ready()
        assert await stack.health(service) == SERVING
        assert await stack.server.drain()
        assert await stack.health(service) == NOT_SERVING
        await stack.server.mark_ready()
        assert await stack.health(service) == NOT_SERVING


async def test_draining_finishes_calls_in_flight_and_refuses_new_ones(stack: Stack):
    seen_by_hook = []

    async def on_drain() -> None:
        seen_by_hook.append((stack.server.ready, await stack.health()))

    async with stack.generate("wait") as chunks:
        await anext(chunks)
        draining = asyncio.create_task(stack.server.drain(on_drain))
        await eventually(lambda: bool(seen_by_hook))
        # The refusal begins once the hook is done.
        with pytest.raises(UnavailableError, match="draining"):
            await _describe_until_refused(stack.client)
        assert not draining.done()
        stack.servicer.release.set()
        assert [chunk.token_ids async for chunk in chunks] == [(2,)]
    assert await draining
    assert seen_by_hook == [(False, NOT_SERVING)]


async def test_calls_that_outlive_the_drain_are_cancelled():
    async with _stack(drain_seconds=0.05) as stack:
        async with stack.generate("wait") as chunks:
            await anext(chunks)
            assert not await stack.server.drain()
            await stack.server.stop()
            with pytest.raises(UnavailableError):
                await anext(chunks)
        assert stack.servicer.cancelled == 1


async def test_a_failing_drain_hook_does_not_stop_the_drain(stack: Stack):
    async def on_drain() -> None:
        raise UnavailableError("the scheduler is gone")

    assert await stack.server.drain(on_drain)


async def test_a_taken_port_is_an_error(stack: Stack):
    second = GrpcServer(
        ServerOptions(port=stack.server.port, host="127.0.0.1"), [], Telemetry(service="other")
    )
    with pytest.raises(ConfigError, match=str(stack.server.port)):
        await second.start()
    with pytest.raises(ConfigError, match=f"{stack.server.port} for metrics"):
        await GrpcServer(
            ServerOptions(port=0, host="127.0.0.1", metrics_port=stack.server.port),
            [],
            Telemetry(service="other"),
        ).start()
    await second.stop()


async def test_a_slow_drain_hook_and_slow_calls_share_one_budget():
    hook_runs = asyncio.Event()

    async def slow_hook() -> None:
        hook_runs.set()
        await asyncio.Event().wait()

    async with _stack(drain_seconds=100.0) as stack, stack.generate("wait") as chunks:
        await anext(chunks)
        clock = LoopClock()
        draining = asyncio.create_task(stack.server.drain(slow_hook))
        await hook_runs.wait()
        await clock.advance(100.0)
        assert not await asyncio.wait_for(draining, 15)  # with a budget for each it would go on


async def test_an_answer_that_cannot_be_read_is_not_the_callers_fault(stack: Stack):
    """A newer verifier may send a finish reason this client does not know."""
    with pytest.raises(DSparkError, match="unreadable answer: finish_reason") as caught:
        await exhaust(stack.client.generate(_request("strange"), deadline_seconds=30.0))
    assert type(caught.value) is DSparkError


async def test_messages_may_be_large(stack: Stack):
    """gRPC's own limit is 4 MB."""
    request = GenerateRequest(request_id="long", prompt_token_ids=(2**32 - 1,) * 2_000_000)
    async with aclosing(stack.client.generate(request, deadline_seconds=30.0)) as chunks:
        assert [chunk.token_ids async for chunk in chunks] == [(1,), (2,)]
