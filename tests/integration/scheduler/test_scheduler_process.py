"""The scheduler as a process: ready, serving, drained by SIGTERM, refusing a bad configuration."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from redis.asyncio import Redis

from dspark_core.records import AssignRequest, Replica, RequestSurvival, Role, RoundReport
from services.common.channels import open_channel
from services.common.clients import SchedulerClient
from tests.support.redis_process import RedisProcess
from tests.support.scheduler_process import ready_port, scheduler_process


async def test_sigterm_ends_open_streams_and_exits_cleanly():
    async with scheduler_process() as process:
        channel = open_channel(f"127.0.0.1:{await ready_port(process)}")
        health = health_pb2_grpc.HealthStub(channel)
        status = (await health.Check(health_pb2.HealthCheckRequest(), timeout=20)).status
        assert status == health_pb2.HealthCheckResponse.SERVING
        client = SchedulerClient(channel, timeout_seconds=30.0)
        await client.register(Replica(replica_id="v", role=Role.VERIFIER, address="h:1", model="m"))

        async def reports() -> AsyncIterator[RoundReport]:
            request = RequestSurvival(sequence_id="s", survival=(0.9,), verify_length=1, accepted=1)
            yield RoundReport(replica_id="v", round=1, requests=(request,), batch_tokens=2, step_seconds=0.01)
            await asyncio.Event().wait()

        async with asyncio.timeout(30), aclosing(client.coordinate(reports())) as plans:
            assert (await anext(plans)).based_on_round == 1
            process.send_signal(signal.SIGTERM)
            with pytest.raises(StopAsyncIteration):  # ended by the drain, not cut
                await anext(plans)
            assert await process.wait() == 0
        await channel.close()


async def test_the_streams_of_verifiers_keep_nobody_else_out():
    async with scheduler_process(DSPARK_MAX_CALLS="1") as process, AsyncExitStack() as stack:
        channel = open_channel(f"127.0.0.1:{await ready_port(process)}")
        stack.push_async_callback(channel.close)
        client = SchedulerClient(channel, timeout_seconds=30.0)

        async def reports(name: str) -> AsyncIterator[RoundReport]:
            request = RequestSurvival(sequence_id="s", survival=(0.9,), verify_length=1, accepted=1)
            yield RoundReport(
                replica_id=name, round=1, requests=(request,), batch_tokens=2, step_seconds=0.01
            )
            await asyncio.Event().wait()

        async with asyncio.timeout(30):
            for name in ("v", "w"):
                await client.register(Replica(replica_id=name, role=Role.VERIFIER, address="h:1", model="m"))
                plans = await stack.enter_async_context(aclosing(client.coordinate(reports(name))))
                assert (await anext(plans)).based_on_round == 1
            await client.deregister("v")
            assert (await client.assign(AssignRequest(request_id="r", model="m"))).replica_id == "w"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DSPARK_PORT", "http"),
        ("REDIS_URL", "http://redis"),
        ("DSPARK_REDIS_PREFIX", "a b"),
        ("DSPARK_LOG_FORMAT", "xml"),
    ],
)
async def test_a_bad_setting_is_one_line_and_exit_code_2(name: str, value: str):
    async with scheduler_process(**{name: value}) as process, asyncio.timeout(120):
        _, stderr = await process.communicate()
    assert process.returncode == 2
    assert name in stderr.decode()
    assert "Traceback" not in stderr.decode()


async def test_two_installations_share_a_redis_by_different_prefixes(redis_process: RedisProcess):
    async with (
        scheduler_process(REDIS_URL=redis_process.url) as one,
        scheduler_process(REDIS_URL=redis_process.url, DSPARK_REDIS_PREFIX="other") as two,
        AsyncExitStack() as stack,
    ):
        for process, name in ((one, "v"), (two, "w")):
            channel = open_channel(f"127.0.0.1:{await ready_port(process)}")
            stack.push_async_callback(channel.close)
            client = SchedulerClient(channel, timeout_seconds=30.0)
            # Refused by a standby.
            await client.register(Replica(replica_id=name, role=Role.VERIFIER, address="h:1", model="m"))
            assert [replica.replica_id for replica in await client.list_replicas()] == [name]
        redis = await stack.enter_async_context(Redis.from_url(redis_process.url, decode_responses=True))
        found = set(await redis.keys())
        assert found >= {"dspark:leader", "dspark:replica:v", "other:leader", "other:replica:w"}


@pytest.mark.parametrize("user", ["", ":wrong@", "other:pw@", "noscripts:pw@"])
async def test_a_redis_that_refuses_it_ends_it_rather_than_make_it_a_second_leader(
    redis_process: RedisProcess, user: str
):
    async with Redis.from_url(redis_process.url) as redis:
        await redis.execute_command("ACL", "SETUSER", "other", "on", ">pw", "~other:*", "+@all")
        await redis.execute_command("ACL", "SETUSER", "noscripts", "on", ">pw", "~*", "+@all", "-@scripting")
        await redis.config_set("requirepass", "secret")
    url = redis_process.url.replace("redis://", f"redis://{user}")
    async with scheduler_process(REDIS_URL=url) as process, asyncio.timeout(120):
        _, stderr = await process.communicate()
    assert process.returncode == 2
    assert "may not hold the leader lock 'dspark:leader'" in stderr.decode()
    assert "Traceback" not in stderr.decode()


async def test_a_redis_that_can_never_hold_the_lock_ends_it(redis_process: RedisProcess):
    url = redis_process.url.removesuffix("/0") + "/99"
    async with scheduler_process(REDIS_URL=url) as process, asyncio.timeout(60):
        _, stderr = await process.communicate()
    assert process.returncode == 2
    message = "the server of REDIS_URL cannot hold the leader lock 'dspark:leader': DB index is out of range"
    assert message in stderr.decode()


async def test_an_unreachable_redis_does_not_keep_it_from_serving():
    async with scheduler_process(REDIS_URL="redis://127.0.0.1:1/0") as process:
        channel = open_channel(f"127.0.0.1:{await ready_port(process)}")
        client = SchedulerClient(channel, timeout_seconds=30.0)
        await client.register(Replica(replica_id="v", role=Role.VERIFIER, address="h:1", model="m"))
        assert (await client.assign(AssignRequest(request_id="r", model="m"))).replica_id == "v"
        await channel.close()
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(30):
            assert await process.wait() == 0
