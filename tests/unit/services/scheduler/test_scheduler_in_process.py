"""The scheduler without a network: what the embedded default uses."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from prometheus_client import CollectorRegistry

from dspark_core.errors import InvalidRequestError
from dspark_core.records import AssignRequest, Replica, RequestSurvival, Role, RoundReport
from services.scheduler.mailbox import Mailbox
from services.scheduler.scheduler import Scheduler


def _report(round_: int, replica_id: str = "v", survival: tuple[float, ...] = (0.9,)) -> RoundReport:
    return RoundReport(
        replica_id=replica_id,
        round=round_,
        requests=(RequestSurvival(sequence_id="s", survival=survival, verify_length=1, accepted=1),),
        batch_tokens=2,
        step_seconds=0.01,
    )


async def _send(*reports: RoundReport) -> AsyncIterator[RoundReport]:
    for report in reports:
        yield report


async def test_a_slow_reader_gets_a_plan_for_the_newest_report_only():
    metrics = CollectorRegistry()
    scheduler = Scheduler(metrics=metrics)
    plans = [plan async for plan in scheduler.coordinate(_send(*(_report(n) for n in range(1, 51))))]
    assert [plan.based_on_round for plan in plans] == [50]
    superseded = metrics.get_sample_value("dspark_scheduler_reports_total", {"result": "superseded"})
    assert superseded == 49


async def test_stale_and_unplannable_reports_are_counted_and_answered_by_nothing():
    metrics = CollectorRegistry()
    scheduler = Scheduler(metrics=metrics)
    sent = [_report(2), _report(1), _report(3, survival=())]
    assert [plan async for plan in scheduler.coordinate(_send(*sent))] == []
    for result in ("stale", "unplannable"):
        assert metrics.get_sample_value("dspark_scheduler_reports_total", {"result": result}) == 1


async def test_one_stream_speaks_for_one_verifier():
    scheduler = Scheduler()
    with pytest.raises(InvalidRequestError, match="must stay 'v' within a stream, got 'w'"):
        async for _ in scheduler.coordinate(_send(_report(1), _report(2, replica_id="w"))):
            pass


async def test_a_verifier_that_has_a_newer_stream_is_not_lost_with_its_last_one():
    """Requests avoid a lost one, even where the other has more of them."""
    scheduler = Scheduler()
    ends = {number: asyncio.Event() for number in (1, 2)}

    async def reports(number: int) -> AsyncIterator[RoundReport]:
        yield _report(number)
        await ends[number].wait()

    async def chosen() -> str:
        return (await scheduler.assign(AssignRequest(request_id="r", model="m"))).replica_id

    await scheduler.register(Replica(replica_id="v", role=Role.VERIFIER, address="v:1", model="m"))
    busy = Replica(replica_id="w", role=Role.VERIFIER, address="w:1", model="m", running_requests=50)
    await scheduler.register(busy)
    streams = [asyncio.create_task(scheduler.listen(reports(number))) for number in (1, 2)]
    for _ in range(5):
        await asyncio.sleep(0)
    ends[1].set()
    await streams[0]
    assert await chosen() == "v"
    ends[2].set()
    await streams[1]
    assert await chosen() == "w"


async def test_draining_ends_streams_that_wait_for_reports():
    scheduler = Scheduler()
    forever = asyncio.Event()
    closed = asyncio.Event()

    async def reports() -> AsyncIterator[RoundReport]:
        try:
            yield _report(1)
            await forever.wait()
        finally:
            closed.set()

    async with asyncio.timeout(15):
        async with aclosing(scheduler.coordinate(reports())) as plans:
            assert (await anext(plans)).based_on_round == 1
            await scheduler.drain()
            with pytest.raises(StopAsyncIteration):
                await anext(plans)
        await closed.wait()
        assert [plan async for plan in scheduler.coordinate(reports())] == []


async def test_closing_the_plans_stops_reading_reports():
    scheduler = Scheduler()
    closed = asyncio.Event()

    async def reports() -> AsyncIterator[RoundReport]:
        try:
            yield _report(1)
            await asyncio.Event().wait()
        finally:
            closed.set()

    async with asyncio.timeout(15):
        async with aclosing(scheduler.coordinate(reports())) as plans:
            await anext(plans)
        await closed.wait()


async def test_a_mailbox_keeps_the_newest_and_delivers_it_after_closing():
    mailbox: Mailbox[int] = Mailbox()
    assert not mailbox.put(0)
    assert mailbox.put(1)
    mailbox.close()
    assert await mailbox.take() == 1
    assert await mailbox.take() is None
