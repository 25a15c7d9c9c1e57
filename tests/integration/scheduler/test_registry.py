"""One contract for both registries; Redis is a real server."""

import asyncio
import json
import time
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from dspark_core.errors import UnavailableError
from dspark_core.records import Replica, Role
from services.scheduler.storage.registry import MemoryRegistry, RedisRegistry, Registry, replica_to_json
from tests.support.redis_process import RedisProcess
from tests.support.replicas import new_replica


@pytest.fixture(params=["memory", "redis"])
async def registry(request: pytest.FixtureRequest) -> AsyncIterator[Registry]:
    registry: Registry
    if request.param == "memory":
        registry = MemoryRegistry()
    else:
        registry = RedisRegistry(request.getfixturevalue("redis_process").url)
    yield registry
    await registry.close()


async def test_replicas_come_back_as_they_were_put(registry: Registry):
    drafter = Replica(replica_id="d ü:1", role=Role.DRAFTER, address="[::1]:50051", model="m", draining=True)
    verifier = new_replica("v", running_requests=2, waiting_requests=7, free_kv_fraction=0.125)
    await registry.put(verifier, 30)
    await registry.put(drafter, 30)
    assert await registry.replicas() == (drafter, verifier)


async def test_the_last_put_wins(registry: Registry):
    await registry.put(new_replica("v"), 30)
    await registry.put(new_replica("v", running_requests=1), 30)
    assert await registry.replicas() == (new_replica("v", running_requests=1),)


async def test_removed_replicas_are_gone_and_unknown_ones_are_ignored(registry: Registry):
    await registry.put(new_replica("v"), 30)
    await registry.remove("v")
    await registry.remove("never-was")
    assert await registry.replicas() == ()


async def test_leases_run_out_one_by_one(registry: Registry):
    await registry.put(new_replica("short"), 0.05)
    await registry.put(new_replica("long"), 30)
    deadline = time.monotonic() + 10
    while await registry.replicas() != (new_replica("long"),):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_a_renewal_outlives_the_first_lease(registry: Registry):
    await registry.put(new_replica("v"), 0.05)
    await registry.put(new_replica("v"), 30)
    await registry.put(new_replica("witness"), 0.1)
    deadline = time.monotonic() + 10
    while len(await registry.replicas()) == 2:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    assert await registry.replicas() == (new_replica("v"),)


async def test_schedulers_share_what_is_in_redis(redis_process: RedisProcess):
    one, other = RedisRegistry(redis_process.url), RedisRegistry(redis_process.url)
    await one.put(new_replica("v"), 30)
    assert await other.replicas() == (new_replica("v"),)
    await other.remove("v")
    assert await one.replicas() == ()
    await one.close()
    await other.close()


async def test_the_index_forgets_replicas_that_left_without_a_word(redis_process: RedisProcess):
    """Pods have new names at every restart; the index must not keep them for ever."""
    now = [time.time() - 2 * 3600.0]
    registry = RedisRegistry(redis_process.url, wall_clock=lambda: now[0])
    await registry.put(new_replica("old"), 0.001)
    now[0] = time.time()
    await registry.put(new_replica("new"), 30)
    async with Redis.from_url(redis_process.url, decode_responses=True) as redis:
        assert await redis.zrange("dspark:replicas", 0, -1) == ["new"]
    await registry.close()


async def test_broken_and_newer_entries_do_not_hide_the_others(
    redis_process: RedisProcess, caplog: pytest.LogCaptureFixture
):
    registry = RedisRegistry(redis_process.url)
    await registry.put(new_replica("good"), 30)
    await registry.put(new_replica("newer"), 30)
    await registry.put(new_replica("broken"), 30)
    newer = '{"replica_id": "newer", "role": "verifier", "address": "newer:1", "model": "m", "colour": "red"}'
    async with Redis.from_url(redis_process.url) as redis:
        await redis.set("dspark:replica:newer", newer)
        await redis.set("dspark:replica:broken", '{"replica_id": "broken"}')
    assert await registry.replicas() == (new_replica("good"), new_replica("newer"))
    assert "broken" in caplog.text
    await registry.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"replica_id": 5},
        {"replica_id": "another"},
        {"role": ["verifier"]},
        {"address": None},
        {"model": ["m"]},
        {"draining": 1},
        {"running_requests": 1.5},
        {"waiting_requests": 2**64},
        {"free_kv_fraction": True},
        {"weights": {}},
        {"weights": "\ud800"},
    ],
    ids=str,
)
async def test_entries_of_wrong_types_or_under_another_s_key_are_skipped(
    redis_process: RedisProcess, caplog: pytest.LogCaptureFixture, wrong: dict
):
    """In the scheduler's state they would fail every listing and assignment."""
    registry = RedisRegistry(redis_process.url)
    await registry.put(new_replica("good"), 30)
    await registry.put(new_replica("mistyped"), 30)
    record = {**json.loads(replica_to_json(new_replica("mistyped"))), **wrong}
    async with Redis.from_url(redis_process.url) as redis:
        await redis.set("dspark:replica:mistyped", json.dumps(record))
        await redis.set("dspark:replica:no text", b"\xff\xfe")
        await redis.zadd("dspark:replicas", {"no text": time.time()})
    assert await registry.replicas() == (new_replica("good"),)
    assert next(iter(wrong)) in caplog.text
    await registry.close()


async def test_a_lost_redis_is_unavailable_and_comes_back(redis_process: RedisProcess):
    registry = RedisRegistry(redis_process.url)
    await registry.put(new_replica("v"), 30)
    redis_process.stop()
    for attempt in (registry.replicas(), registry.put(new_replica("v"), 30), registry.remove("v")):
        with pytest.raises(UnavailableError, match="redis does not answer"):
            await attempt
    redis_process.start()
    assert await registry.replicas() == ()
    await registry.put(new_replica("v"), 30)
    assert await registry.replicas() == (new_replica("v"),)
    await registry.close()
