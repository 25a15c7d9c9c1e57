"""A scheduler on loopback gRPC, a verifier that misbehaves on request, and a real Redis."""

from collections.abc import AsyncIterator, Iterator

import grpc.aio
import pytest

from services.common.channels import open_channel
from services.common.clients import SchedulerClient
from services.common.options import ServerOptions
from services.common.server import GrpcServer
from services.common.telemetry import Telemetry
from services.scheduler.scheduler import Scheduler
from services.scheduler.servicer import SchedulerServicer
from tests.support.clock import ManualClock
from tests.support.redis_process import RedisProcess

LEASE_SECONDS = 10.0


@pytest.fixture
def redis_process() -> Iterator[RedisProcess]:
    process = RedisProcess()
    process.start()
    yield process
    process.stop()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry(service="scheduler")


@pytest.fixture
async def scheduler(clock: ManualClock, telemetry: Telemetry) -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(lease_seconds=LEASE_SECONDS, metrics=telemetry.registry, clock=clock)
    await scheduler.start()
    yield scheduler
    await scheduler.close()


@pytest.fixture
async def server(scheduler: Scheduler, telemetry: Telemetry) -> AsyncIterator[GrpcServer]:
    options = ServerOptions(port=0, host="127.0.0.1", drain_seconds=5.0)
    server = GrpcServer(options, [SchedulerServicer(scheduler).register], telemetry)
    await server.start()
    await server.mark_ready()
    yield server
    await server.stop()


@pytest.fixture
async def channel(server: GrpcServer) -> AsyncIterator[grpc.aio.Channel]:
    channel = open_channel(f"127.0.0.1:{server.port}")
    yield channel
    await channel.close()


@pytest.fixture
def client(channel: grpc.aio.Channel) -> SchedulerClient:
    return SchedulerClient(channel, timeout_seconds=30.0)
