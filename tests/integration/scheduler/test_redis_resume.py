"""Schedulers over a real Redis that restarts, and schedulers that restart over a Redis that stays."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry

from dspark_core.records import AssignRequest
from services.common.registration import RegistrationLoop
from services.scheduler.scheduler import Scheduler
from services.scheduler.storage.registry import RedisRegistry
from tests.support.polling import eventually
from tests.support.redis_process import RedisProcess
from tests.support.replicas import new_replica


@asynccontextmanager
async def _scheduler(
    redis: RedisProcess, metrics: CollectorRegistry | None = None
) -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(
        lease_seconds=30.0, registry=RedisRegistry(redis.url), sync_seconds=0.02, metrics=metrics
    )
    await scheduler.start()
    try:
        yield scheduler
    finally:
        await scheduler.close()


async def test_a_restarted_scheduler_knows_the_replicas_at_once(redis_process: RedisProcess):
    async with _scheduler(redis_process) as before:
        await before.register(new_replica("v"))
    async with _scheduler(redis_process) as after:
        assert (await after.assign(AssignRequest(request_id="r", model="m"))).replica_id == "v"


async def test_two_schedulers_see_each_others_replicas(redis_process: RedisProcess):
    async with _scheduler(redis_process) as one, _scheduler(redis_process) as other:
        await one.register(new_replica("v"))
        async with asyncio.timeout(15):
            while await other.list_replicas() != (new_replica("v"),):
                await asyncio.sleep(0.01)
            await one.deregister("v")
            while await other.list_replicas():
                await asyncio.sleep(0.01)


async def test_redis_restarting_empty_interrupts_nothing(redis_process: RedisProcess):
    metrics = CollectorRegistry()

    def registry_up() -> bool:
        return metrics.get_sample_value("dspark_scheduler_registry_up") == 1

    async with _scheduler(redis_process, metrics) as scheduler:
        loop = RegistrationLoop(scheduler, lambda: new_replica("v"))
        loop.start()
        async with asyncio.timeout(15):
            await loop.wait_registered()
        redis_process.stop()
        await eventually(lambda: not registry_up())
        assert (await scheduler.assign(AssignRequest(request_id="r", model="m"))).replica_id == "v"
        await scheduler.register(new_replica("w"))
        redis_process.start()
        await eventually(registry_up)
        async with _scheduler(redis_process) as fresh:
            assert await fresh.list_replicas() == (new_replica("v"), new_replica("w"))
        await loop.stop()
        assert await scheduler.list_replicas() == (new_replica("w"),)
