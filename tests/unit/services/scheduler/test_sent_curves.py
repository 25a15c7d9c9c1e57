"""Verifiers without a profile are sent the step times of their kind."""

import asyncio
from collections.abc import AsyncIterator

from dspark_core.records import ReplicaKind, RequestSurvival, RoundReport, StepTime
from services.scheduler.scheduler import Scheduler

KIND = ReplicaKind(model="m", engine="native", hardware="cpu", dtype="float32")
REQUESTS = (RequestSurvival(sequence_id="s", survival=(0.9, 0.8), verify_length=0, accepted=0),)


def _profile(milliseconds: float) -> tuple[StepTime, ...]:
    return tuple(
        StepTime(requests=n, batch_tokens=n, context_tokens=0, seconds=milliseconds / 1000 * (1 + n / 10))
        for n in (1, 8, 32)
    )


async def _reports(
    name: str, profile: tuple[StepTime, ...] = (), rounds: tuple[int, ...] = (1, 2, 3)
) -> AsyncIterator[RoundReport]:
    for number in rounds:
        yield RoundReport(
            replica_id=name,
            round=number,
            requests=REQUESTS,
            batch_tokens=1,
            step_seconds=0.02,
            kind=KIND if number == rounds[0] else None,
            profile=profile if number == rounds[0] else (),
        )


async def _curves(
    scheduler: Scheduler, name: str, profile: tuple[StepTime, ...] = ()
) -> list[tuple[StepTime, ...]]:
    return [plan.curve async for plan in scheduler.coordinate(_reports(name, profile)) if plan.curve]


async def test_a_verifier_without_a_profile_is_sent_the_curve_once_per_stream():
    scheduler = Scheduler()
    assert await _curves(scheduler, "profiled", _profile(20.0)) == []
    (curve,) = await _curves(scheduler, "newcomer")
    assert [point.requests for point in curve] == [1, 8, 32]
    (again,) = await _curves(scheduler, "newcomer")  # it may have restarted
    assert again == curve


async def test_few_rounds_of_its_own_are_no_curve_for_a_verifier_without_a_profile():
    scheduler = Scheduler()
    assert await _curves(scheduler, "alone") == []
    assert await _curves(scheduler, "profiled", _profile(40.0)) == []
    (curve,) = await _curves(scheduler, "alone")
    assert [point.batch_tokens for point in curve] == [1, 8, 32]


async def test_a_curve_reaches_who_was_there_before_in_the_stream_that_is_open():
    scheduler, due = Scheduler(), asyncio.Queue[RoundReport]()

    async def reports() -> AsyncIterator[RoundReport]:
        while True:
            yield await due.get()

    plans, sent = scheduler.coordinate(reports()), []
    async for report in _reports("early", rounds=(1, 2, 3, 4)):
        if report.round == 3:
            assert await _curves(scheduler, "late", _profile(40.0)) == []
        due.put_nowait(report)
        sent.append(len((await anext(plans)).curve))
    assert sent == [0, 0, 3, 0]
    await plans.aclose()


async def test_who_starts_again_without_measuring_is_sent_the_curve_too():
    """At the same address, as a pod's successor."""
    scheduler = Scheduler()
    assert await _curves(scheduler, "pod", _profile(20.0)) == []
    (curve,) = await _curves(scheduler, "pod")
    assert [point.batch_tokens for point in curve] == [1, 8, 32]
