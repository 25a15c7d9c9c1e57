"""Plans from the scheduler are followed while they fit, and never waited for."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
from collections.abc import AsyncIterable, AsyncIterator

import pytest
from prometheus_client import CollectorRegistry

from dspark_core.algorithms.draft_price import FRESH_SECONDS, HALF_LIFE_SECONDS
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.errors import DSparkError, NotLeaderError, UnavailableError
from dspark_core.records import ReplicaKind, RequestSurvival, RoundReport, StepTime, VerifierLoad, VerifyPlan
from services.scheduler.scheduler import Scheduler
from services.verifier.metrics import ObservedPlanSource, VerifierMetrics
from services.verifier.plans import MAX_PLAN_AGE_ROUNDS, CoordinatedPlanSource
from tests.support.clock import ManualClock
from tests.support.full_plans import FullPlans
from tests.support.polling import eventually

CURVE = tuple(
    StepTime(requests=1, batch_tokens=tokens, context_tokens=0, seconds=seconds)
    for tokens, seconds in ((1, 0.010), (8, 0.012))
)
SURVIVAL = [[0.9, 0.8, 0.7], [0.85, 0.1]]
REQUESTS = [PlanRequest(survival=row) for row in SURVIVAL]


def report(number: int) -> RoundReport:
    requests = tuple(
        RequestSurvival(sequence_id=f"r{i}", survival=tuple(row), verify_length=0, accepted=0)
        for i, row in enumerate(SURVIVAL)
    )
    return RoundReport(
        replica_id="v",
        round=number,
        requests=requests,
        batch_tokens=4,
        step_seconds=0.011,
        draft_seconds=0.001,
    )


class ScriptedScheduler:
    """Answers each report with a plan based on it, of a given capacity; or is away."""

    def __init__(self, capacity: int = 2) -> None:
        self.capacity = capacity
        self.refusal: DSparkError | None = None
        self.silent = False
        self.reports: list[RoundReport] = []

    async def coordinate(self, reports: AsyncIterable[RoundReport]) -> AsyncIterator[VerifyPlan]:
        if self.refusal is not None:
            raise self.refusal
        async for one in reports:
            self.reports.append(one)
            if not self.silent:
                yield VerifyPlan(based_on_round=one.round, draft_token_capacity=self.capacity)


async def test_a_plan_two_rounds_old_is_followed_and_the_profile_is_sent_once() -> None:
    scheduler = ScriptedScheduler()
    plans = CoordinatedPlanSource(scheduler, FullPlans(), CURVE)
    plans.start()
    for number in (1, 2):
        plans.report(report(number))
        await eventually(lambda number=number: len(scheduler.reports) == number)
    await eventually(lambda: plans.newest_round == 2)
    assert plans.plan(REQUESTS) == (1, 1)  # two tokens: 0.9 of the first request, 0.85 of the second
    assert [bool(one.profile) for one in scheduler.reports] == [True, False]
    await plans.close()


async def test_a_plan_from_the_previous_round_is_too_young_and_an_old_one_too_old() -> None:
    scheduler = ScriptedScheduler()
    plans = CoordinatedPlanSource(scheduler, FullPlans(), CURVE)
    plans.start()
    plans.report(report(1))
    await eventually(lambda: plans.newest_round == 1)
    assert plans.plan(REQUESTS) == (3, 2)  # round 2 may not use what round 1 showed
    scheduler.silent = True
    for number in range(2, MAX_PLAN_AGE_ROUNDS + 2):
        plans.report(report(number))
    assert plans.plan(REQUESTS) == (3, 2)
    assert plans.last_planner == "local"
    await plans.close()


async def test_without_a_scheduler_planning_is_local_and_reports_never_block() -> None:
    scheduler = ScriptedScheduler()
    scheduler.refusal = UnavailableError("no scheduler")
    plans = CoordinatedPlanSource(scheduler, FullPlans(), CURVE)
    plans.start()
    for number in range(1, 200):
        plans.report(report(number))
    await asyncio.sleep(0)
    assert plans.plan(REQUESTS) == (3, 2)
    assert plans.last_planner == "local"
    await plans.close()


async def test_the_real_scheduler_answers_with_a_capacity_that_pays() -> None:
    plans = CoordinatedPlanSource(Scheduler(), FullPlans(), CURVE)
    plans.start()
    for number in range(1, 4):
        plans.report(report(number))
        await eventually(lambda number=number: plans.newest_round == number)
    lengths = plans.plan(REQUESTS)
    assert plans.last_planner == "scheduler"
    # The curve is nearly flat, so the likely tokens are verified; 0.085 of throughput is not worth the last.
    assert lengths[0] == 3
    assert lengths[1] >= 1
    # Greedy requests may look ahead, so their optimum is known here and no capacity is heeded.
    plans.plan([dataclasses.replace(request, coupled=True) for request in REQUESTS])
    assert plans.last_planner == "local"
    await plans.close()


class Loads:
    """What a verifier would tell, set by the test."""

    def __init__(self) -> None:
        self.now = VerifierLoad()

    def take(self) -> VerifierLoad:
        return self.now


async def test_a_load_that_changes_between_rounds_is_told_without_one() -> None:
    scheduler, loads = ScriptedScheduler(), Loads()
    plans = CoordinatedPlanSource(scheduler, FullPlans(), CURVE, replica_id="v", load=loads.take)
    plans.start()
    await eventually(lambda: len(scheduler.reports) == 1)  # at once, with the profile: no round is needed
    assert (scheduler.reports[0].round, scheduler.reports[0].replica_id) == (0, "v")
    assert scheduler.reports[0].profile == CURVE
    loads.now = VerifierLoad(running_requests=3)
    await eventually(lambda: len(scheduler.reports) == 2)
    assert scheduler.reports[1].load == loads.now
    assert plans.newest_round == 0  # the answer to a load is no plan for a round
    plans.report(report(1))
    await eventually(lambda: any(one.round == 1 for one in scheduler.reports))
    assert scheduler.reports[-1].load == loads.now
    await plans.close()


async def test_step_times_of_its_kind_reach_a_verifier_that_was_not_profiled() -> None:
    kind = ReplicaKind(model="m", engine="native", hardware="cpu", dtype="float32")
    scheduler = Scheduler()
    local = FullPlans()
    for profile in (CURVE, ()):
        name = "profiled" if profile else "newcomer"
        plans = CoordinatedPlanSource(scheduler, local, profile, replica_id=name, kind=kind)
        plans.start()
        plans.report(dataclasses.replace(report(1), replica_id=name))
        await eventually(lambda plans=plans: plans.newest_round == 1)
        await plans.close()
    assert [[point.batch_tokens for point in one.verify.points] for one in local.adopted] == [[1, 8]]


async def test_a_price_reaches_the_choice_whom_to_draft_for_and_fades_without_news() -> None:
    class Priced(ScriptedScheduler):
        async def coordinate(self, reports: AsyncIterable[RoundReport]) -> AsyncIterator[VerifyPlan]:
            async for one in reports:
                if one.round == 1:
                    yield VerifyPlan(based_on_round=1, draft_token_capacity=2, draft_price=80.0)
                elif one.round == 2:
                    yield VerifyPlan(based_on_round=0, draft_token_capacity=0, draft_price=120.0)

    clock, local = ManualClock(), FullPlans()
    plans = CoordinatedPlanSource(Priced(), local, CURVE, clock=clock)
    plans.start()

    def price() -> float:
        plans.wants_draft([])
        return local.draft_price

    assert price() == 0.0
    plans.report(report(1))
    await eventually(lambda: price() == 80.0)
    plans.report(report(2))
    await eventually(lambda: price() == 120.0)  # told even while there is nothing to plan
    clock.advance(FRESH_SECONDS)
    assert price() == 120.0
    clock.advance(HALF_LIFE_SECONDS)
    assert price() == pytest.approx(60.0)
    await plans.close()


async def test_that_plans_stop_and_that_they_are_back_is_each_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    scheduler = ScriptedScheduler()
    scheduler.refusal = UnavailableError("no scheduler")
    plans = CoordinatedPlanSource(scheduler, FullPlans(), CURVE)
    plans.start()
    await eventually(lambda: bool(caplog.records))
    scheduler.refusal = None
    for number in (1, 2):
        plans.report(report(number))
    await eventually(lambda: plans.newest_round == 2)
    assert [one.getMessage() for one in caplog.records] == [
        "no plans from the scheduler, planning locally: no scheduler",
        "plans from the scheduler are back",
    ]
    await plans.close()


async def test_why_plans_stop_is_told_again_when_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    scheduler = ScriptedScheduler()
    scheduler.refusal = NotLeaderError("this scheduler is a standby")
    plans = CoordinatedPlanSource(scheduler, FullPlans(), CURVE)
    plans.start()
    await eventually(lambda: len(caplog.records) == 1)
    scheduler.refusal = UnavailableError("no scheduler")
    await eventually(lambda: len(caplog.records) == 2)
    assert [(one.levelname, one.getMessage().split(": ")[1]) for one in caplog.records] == [
        ("INFO", "this scheduler is a standby"),  # a verifier that asks it first is told whom to ask
        ("WARNING", "no scheduler"),
    ]
    await plans.close()


async def test_an_unexpected_error_is_logged_and_the_scheduler_asked_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(ScriptedScheduler):
        streams = 0

        async def coordinate(self, reports: AsyncIterable[RoundReport]) -> AsyncIterator[VerifyPlan]:
            self.streams += 1
            if self.streams == 1:
                raise ValueError("no such thing")
            async for one in reports:
                yield VerifyPlan(based_on_round=one.round, draft_token_capacity=1)

    plans = CoordinatedPlanSource(Broken(), FullPlans(), CURVE)
    plans.start()
    plans.report(report(1))
    await eventually(lambda: plans.newest_round == 1)
    assert "unexpected error while following the scheduler" in caplog.text
    await plans.close()


async def test_a_scheduler_with_nothing_to_plan_says_that_it_hears() -> None:
    """And that is no plan: the verifier goes on by itself."""
    scheduler = Scheduler(clock=itertools.count().__next__)  # a second passes at every look
    loads = asyncio.Queue[RoundReport]()

    async def reports() -> AsyncIterator[RoundReport]:
        while True:
            yield await loads.get()

    stream = scheduler.coordinate(reports())
    async with asyncio.timeout(15):
        for _ in range(2):
            loads.put_nowait(RoundReport(replica_id="v", round=0, load=VerifierLoad()))
            heard = await anext(stream)
            assert heard.based_on_round == 0
    await stream.aclose()

    async def only_heartbeats(reports: AsyncIterable[RoundReport]) -> AsyncIterator[VerifyPlan]:
        async for _ in reports:
            yield heard

    listening = ScriptedScheduler()
    listening.coordinate = only_heartbeats
    plans = CoordinatedPlanSource(listening, FullPlans(), CURVE)
    plans.start()
    for number in (1, 2, 3):
        plans.report(report(number))
    await asyncio.sleep(0)
    assert plans.plan(REQUESTS) == (3, 2)
    assert (plans.last_planner, plans.newest_round) == ("local", 0)
    await plans.close()


async def test_plans_are_counted_by_who_made_them() -> None:
    registry = CollectorRegistry()
    plans = CoordinatedPlanSource(ScriptedScheduler(), FullPlans(), CURVE)
    counted = ObservedPlanSource(plans, VerifierMetrics(registry), lambda: plans.last_planner)
    plans.start()
    counted.plan(REQUESTS)
    for number in (1, 2):
        counted.report(report(number))
    await eventually(lambda: plans.newest_round == 2)
    counted.plan(REQUESTS)
    counted.plan(REQUESTS)
    assert registry.get_sample_value("dspark_plans_total", {"source": "local"}) == 1
    assert registry.get_sample_value("dspark_plans_total", {"source": "scheduler"}) == 2
    await plans.close()
