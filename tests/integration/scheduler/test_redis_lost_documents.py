"""A real Redis that restarts empty gets step times and calibrations again, though nothing was learned."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from dspark_core.cluster.planning.calibration import MIN_ROUNDS
from dspark_core.records import ReplicaKind, RequestSurvival, RoundReport, StepTime
from services.scheduler.leadership.redis_lock import RedisLeaderLock
from services.scheduler.scheduler import Scheduler
from services.scheduler.storage.redis_documents import RedisDocumentStore
from services.scheduler.storage.redis_store import DEFAULT_KEYS
from services.scheduler.storage.registry import RedisRegistry
from tests.support.polling import eventually
from tests.support.redis_process import RedisProcess

KIND = ReplicaKind(model="m", engine="native", hardware="cpu", dtype="float32")
# Told to survive nine times in ten, never did.
WRONG = (RequestSurvival(sequence_id="s", survival=(0.9,), verify_length=1, accepted=0),) * MIN_ROUNDS
REPORT = RoundReport(
    replica_id="v",
    round=1,
    kind=KIND,
    requests=WRONG,
    batch_tokens=2 * MIN_ROUNDS,
    step_seconds=0.02,
    profile=(StepTime(requests=1, batch_tokens=1, context_tokens=0, seconds=0.02),),
)


@asynccontextmanager
async def _leader(
    redis: RedisProcess, metrics: CollectorRegistry, *, locked: bool
) -> AsyncIterator[Scheduler]:
    """`locked`: elected over the same Redis, which loses the lock as well; else its term stays."""
    scheduler = Scheduler(
        registry=RedisRegistry(redis.url),
        lock=RedisLeaderLock(redis.url, holder="a", address="a:1", lock_seconds=5.0) if locked else None,
        curves=RedisDocumentStore(redis.url, DEFAULT_KEYS.curves, locked=locked),
        calibrations=RedisDocumentStore(redis.url, DEFAULT_KEYS.calibration, locked=locked),
        sync_seconds=0.02,
        renew_seconds=0.02,
        maintain_seconds=0.02,
        metrics=metrics,
    )
    await scheduler.start()
    try:
        yield scheduler
    finally:
        await scheduler.close()


async def _documents(redis: RedisProcess) -> dict[str, dict[str, str]]:
    async with Redis.from_url(redis.url, decode_responses=True) as client:
        return {key: await client.hgetall(key) for key in (DEFAULT_KEYS.curves, DEFAULT_KEYS.calibration)}


async def _until_stored(redis: RedisProcess, kinds: int) -> dict[str, dict[str, str]]:
    async with asyncio.timeout(15):
        while True:
            found = await _documents(redis)
            if len(found[DEFAULT_KEYS.curves]) == kinds and found[DEFAULT_KEYS.calibration]:
                return found
            await asyncio.sleep(0.01)


async def _hear(scheduler: Scheduler, report: RoundReport) -> None:
    async def stream() -> AsyncIterator[RoundReport]:
        yield report

    await scheduler.listen(stream())


@pytest.mark.parametrize("locked", [True, False], ids=["elected by redis", "elected elsewhere"])
async def test_documents_are_written_again_into_an_empty_redis(redis_process: RedisProcess, locked: bool):
    metrics = CollectorRegistry()

    def registry_up() -> bool:
        return metrics.get_sample_value("dspark_scheduler_registry_up") == 1

    async with _leader(redis_process, CollectorRegistry(), locked=locked) as earlier:
        other = replace(REPORT, replica_id="gone", kind=replace(KIND, hardware="gpu"), requests=())
        await _hear(earlier, other)
    async with _leader(redis_process, metrics, locked=locked) as scheduler:
        await _hear(scheduler, REPORT)
        before = await _until_stored(redis_process, kinds=2)
        redis_process.stop()
        await eventually(lambda: not registry_up())
        redis_process.start()
        await eventually(registry_up)
        # Those of a kind that no verifier is of now, too.
        assert await _until_stored(redis_process, kinds=2) == before
