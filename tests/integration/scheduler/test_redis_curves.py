"""Step times in a real Redis: there for the next scheduler, and written by the leader alone."""

import asyncio
from contextlib import AsyncExitStack

from dspark_core.records import ReplicaKind, RequestSurvival, RoundReport, StepTime
from services.scheduler.redis_curves import RedisCurveStore
from services.scheduler.redis_lock import RedisLeaderLock
from services.scheduler.scheduler import Scheduler
from tests.support.redis_process import RedisProcess

KIND = ReplicaKind(model="m", engine="native", hardware="cpu", dtype="float32")
PROFILE = (StepTime(requests=1, batch_tokens=1, context_tokens=0, seconds=0.02),)
REQUESTS = (RequestSurvival(sequence_id="s", survival=(0.9,), verify_length=0, accepted=0),)


def _report(name: str, profile: tuple[StepTime, ...]) -> RoundReport:
    return RoundReport(
        replica_id=name,
        round=1,
        requests=REQUESTS,
        batch_tokens=1,
        step_seconds=0.02,
        kind=KIND,
        profile=profile,
    )


def _lock(redis: RedisProcess, holder: str) -> RedisLeaderLock:
    return RedisLeaderLock(redis.url, holder=holder, address=f"{holder}:1", lock_seconds=30.0)


async def _ask(scheduler: Scheduler, report: RoundReport) -> tuple[StepTime, ...]:
    async def reports():
        yield report

    async with asyncio.timeout(10):
        (plan,) = [plan async for plan in scheduler.coordinate(reports())]
    return plan.curve


async def test_the_next_scheduler_knows_the_curves_of_kinds_it_never_saw(redis_process: RedisProcess):
    for holder, name, profile in (("first", "a", PROFILE), ("second", "b", ())):
        scheduler = Scheduler(lock=_lock(redis_process, holder), store=RedisCurveStore(redis_process.url))
        await scheduler.start()
        curve = await _ask(scheduler, _report(name, profile))
        await scheduler.close()
        assert [point.seconds for point in curve] == ([] if profile else [0.02])


async def test_a_leader_that_was_replaced_writes_nothing(redis_process: RedisProcess):
    async with AsyncExitStack() as stack:
        store = RedisCurveStore(redis_process.url)
        old, new = _lock(redis_process, "old"), _lock(redis_process, "new")
        for one in (store, old, new):
            stack.push_async_callback(one.close)
        before = (await old.hold()).term
        await store.save({"kind": "1"}, before)
        await old.release()
        after = (await new.hold()).term
        await store.save({"kind": "2"}, before)
        assert await store.load() == {"kind": "1"}
        await store.save({"kind": "3"}, after)
        assert await store.load() == {"kind": "3"}
