"""Step times and calibrations in a real Redis: there for the next scheduler, written by the leader alone."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace

from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from dspark_core.algorithms.calibration import ConfidenceScaling
from dspark_core.cluster.planning.calibration import MIN_ROUNDS, CalibrationBook, Traffic
from dspark_core.cluster.planning.curves import CurveBook
from dspark_core.cluster.planning.pace import VerifierPace
from dspark_core.records import ReplicaKind, RequestSurvival, RoundReport, StepTime, VerifyPlan
from services.scheduler.leadership.redis_lock import RedisLeaderLock
from services.scheduler.scheduler import Scheduler
from services.scheduler.storage.documents import SavedDocuments
from services.scheduler.storage.redis_documents import (
    GUARD_SECONDS,
    RedisDocumentStore,
)
from services.scheduler.storage.redis_store import DEFAULT_KEYS
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


def _pace(seconds: float) -> VerifierPace:
    pace = VerifierPace()
    pace.adopt((StepTime(requests=1, batch_tokens=1, context_tokens=0, seconds=seconds),))
    return pace


async def _ask(scheduler: Scheduler, *sent: RoundReport) -> VerifyPlan:
    async def reports():
        for report in sent:
            yield report

    async with asyncio.timeout(15):
        return [plan async for plan in scheduler.coordinate(reports())][-1]


async def test_the_next_scheduler_knows_the_curves_of_kinds_it_never_saw(redis_process: RedisProcess):
    for holder, name, profile in (("first", "a", PROFILE), ("second", "b", ())):
        scheduler = Scheduler(
            lock=_lock(redis_process, holder),
            curves=RedisDocumentStore(redis_process.url, DEFAULT_KEYS.curves),
        )
        await scheduler.start()
        plan = await _ask(scheduler, _report(name, profile))
        await scheduler.close()
        assert [point.seconds for point in plan.curve] == ([] if profile else [0.02])


async def test_a_calibration_outlives_the_scheduler_that_found_it(redis_process: RedisProcess):
    # Told to survive nine times in ten, never did: every position is rescaled.
    wrong = tuple(replace(REQUESTS[0], verify_length=1) for _ in range(MIN_ROUNDS))
    scalings, drifted = [], []
    for holder, sent in (
        ("first", replace(_report("a", PROFILE), requests=wrong)),
        ("second", _report("b", ())),
    ):
        metrics = CollectorRegistry()
        scheduler = Scheduler(
            lock=_lock(redis_process, holder),
            curves=RedisDocumentStore(redis_process.url, DEFAULT_KEYS.curves),
            calibrations=RedisDocumentStore(redis_process.url, DEFAULT_KEYS.calibration),
            metrics=metrics,
        )
        await scheduler.start()
        await _ask(scheduler, sent)
        if holder == "first":
            await scheduler.examine_calibration()
        plan = await _ask(scheduler, replace(sent, round=2))
        scalings.append(plan.scalings)
        drifted.append(
            metrics.get_sample_value("dspark_scheduler_calibration_drift", {"model": "m", "temperature": "0"})
        )
        await scheduler.close()
    assert scalings[0]
    assert scalings[0] == scalings[1]
    assert drifted == [1, 1]


async def test_a_stored_calibration_that_is_none_is_skipped(redis_process: RedisProcess):
    async with AsyncExitStack() as stack:
        lock, store = (
            _lock(redis_process, "x"),
            RedisDocumentStore(redis_process.url, DEFAULT_KEYS.calibration),
        )
        for one in (lock, store):
            stack.push_async_callback(one.close)
        good = '{"0": {"error": 0.2, "scaled_error": 0.1, "scaling": {"temperatures": [2], "biases": [0]}}}'
        bad = {"a": "no json", "b": "[]", "c": '{"0": {}}', "d": good.replace("[2]", "[0]")}
        await store.save({**bad, "good": good}, (await lock.hold()).term)
        book = CalibrationBook()
        await SavedDocuments(book, store, "calibrations").load()
        assert list(book.states()) == [Traffic("good", "0")]
        assert book.states()[Traffic("good", "0")].scaling == ConfidenceScaling((2.0,), (0.0,))


async def test_a_leader_that_was_replaced_writes_nothing(redis_process: RedisProcess):
    async with AsyncExitStack() as stack:
        store = RedisDocumentStore(redis_process.url, DEFAULT_KEYS.curves)
        old, new = _lock(redis_process, "old"), _lock(redis_process, "new")
        for one in (store, old, new):
            stack.push_async_callback(one.close)
        before = (await old.hold()).term
        await store.save({"kind": "1"}, before)
        await old.release()
        after = (await new.hold()).term
        assert not await store.save({"kind": "2"}, before)
        assert await store.load() == {"kind": "1"}
        assert await store.save({"kind": "3"}, after)
        assert await store.load() == {"kind": "3"}


async def test_a_term_of_a_clock_that_was_ahead_keeps_later_leaders_out_for_a_while_only(
    redis_process: RedisProcess, caplog
):
    key = f"{DEFAULT_KEYS.curves}:term"
    async with Redis.from_url(redis_process.url, decode_responses=True) as client:
        books = CurveBook(), CurveBook()
        ahead, later = (
            SavedDocuments(
                book, RedisDocumentStore(redis_process.url, DEFAULT_KEYS.curves, locked=False), "step times"
            )
            for book in books
        )
        books[0].join(KIND, "a", _pace(0.02))
        await ahead.save(2000)
        books[1].join(replace(KIND, model="other"), "b", _pace(0.01))
        for _ in range(3):
            await later.save(1000)
        assert len(await client.hkeys(DEFAULT_KEYS.curves)) == 1
        told = [one for one in caplog.messages if "term 1000 is not the leader's" in one]
        assert len(told) == 1
        assert 0 < await client.ttl(key) <= GUARD_SECONDS
        await client.delete(key)  # as Redis does in the end
        await later.save(1000)  # though nothing changed since it was refused
        assert len(await client.hkeys(DEFAULT_KEYS.curves)) == 2
        for saved in (ahead, later):
            await saved.close()


async def test_who_never_reached_its_lock_overwrites_no_leader_that_did(redis_process: RedisProcess):
    store = RedisDocumentStore(redis_process.url, DEFAULT_KEYS.curves, locked=False)
    assert await store.save({"kind": "before any leader"}, 0)
    assert await store.save({"kind": "the leader's"}, 1000)
    assert not await store.save({"kind": "a stranger's"}, 0)
    assert await store.load() == {"kind": "the leader's"}
    await store.close()


async def test_a_connection_that_was_lost_meanwhile_costs_a_new_leader_nothing(redis_process: RedisProcess):
    store = RedisDocumentStore(redis_process.url, DEFAULT_KEYS.curves)
    assert await store.load() == {}  # connects
    redis_process.stop()
    redis_process.start()
    async with Redis.from_url(redis_process.url) as client:
        await client.hset(DEFAULT_KEYS.curves, "kind", "document")
    assert await store.load() == {"kind": "document"}
    await store.close()


async def test_what_a_restarted_redis_has_lost_is_stored_again(redis_process: RedisProcess):
    book, store = CurveBook(), RedisDocumentStore(redis_process.url, DEFAULT_KEYS.curves, locked=False)
    saved = SavedDocuments(book, store, "step times")
    for kind in (KIND, replace(KIND, model="other")):
        book.join(kind, "a", _pace(0.02))
    await saved.save(0)
    redis_process.stop()
    redis_process.start()
    book.join(KIND, "b", _pace(0.01))  # changes one of the two
    await saved.save(0)  # finds the connection lost
    await saved.save(0)
    async with Redis.from_url(redis_process.url, decode_responses=True) as client:
        assert len(await client.hkeys(DEFAULT_KEYS.curves)) == 2
    await saved.close()
