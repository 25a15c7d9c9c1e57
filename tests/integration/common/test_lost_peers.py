"""What a caller is told of a peer that is lost, and of one that is not there: a real process."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from dspark_core.errors import UnavailableError, UnreachableError
from dspark_core.records import Replica, RequestSurvival, Role, RoundReport
from services.common.channels import open_channel
from services.common.clients import SchedulerClient
from tests.support.polling import eventually
from tests.support.scheduler_process import ready_port, scheduler_process

REPORT = RoundReport(
    replica_id="v",
    round=1,
    requests=(RequestSurvival(sequence_id="s", survival=(0.9,), verify_length=1, accepted=1),),
    batch_tokens=2,
    step_seconds=0.01,
)


async def test_a_peer_that_dies_was_reached_and_one_that_is_gone_is_not():
    async def reports() -> AsyncIterator[RoundReport]:
        yield REPORT
        await asyncio.Event().wait()

    async with scheduler_process() as process, asyncio.timeout(120):
        channel = open_channel(f"127.0.0.1:{await ready_port(process)}")
        client = SchedulerClient(channel, timeout_seconds=30.0)
        await client.register(Replica(replica_id="v", role=Role.VERIFIER, address="h:1", model="m"))
        plans = client.coordinate(reports())
        await anext(plans)
        process.kill()
        with pytest.raises(UnavailableError) as lost:
            [plan async for plan in plans]
        assert type(lost.value) is UnavailableError
        # A call may still be sent over the connection until gRPC has closed it, too.
        await eventually(lambda: channel.get_state() is not grpc.ChannelConnectivity.READY)
        for _ in range(3):  # connecting fails, then calls fail without another attempt for a while
            with pytest.raises(UnreachableError):
                await client.list_replicas()
        await channel.close()
