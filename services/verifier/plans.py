"""A `PlanSource` that follows the scheduler while its plans are fresh, and plans locally otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Protocol

from dspark_core.algorithms.delayed_scheduler import MIN_PLAN_AGE_ROUNDS
from dspark_core.algorithms.draft_policy import DraftCandidate
from dspark_core.algorithms.draft_price import faded
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.planner import follows_capacity
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.algorithms.survival_scaling import BandedScaling, banded, scaled
from dspark_core.engine.protocols import PlanSource
from dspark_core.errors import DSparkError, NotLeaderError
from dspark_core.records import ReplicaKind, RoundReport, StepTime, VerifierLoad, VerifyPlan
from services.common.lifecycle import end
from services.common.protocols import CoordinationApi
from services.verifier.profiling import adopted

_log = logging.getLogger(__name__)

MAX_PLAN_AGE_ROUNDS = 8
"""Older plans describe a batch that no longer exists."""
MAX_QUEUED_REPORTS = 16
RECONNECT_SECONDS = 0.25
LOAD_SECONDS = 0.1
"""While no round ends, a changed load is reported within this time."""
KEEPALIVE_SECONDS = 1.0
"""While no round ends, an unchanged load is reported within this time."""
LOCAL_PLANNER, SCHEDULER_PLANNER = "local", "scheduler"
"""Names of planners in metrics and traces."""


class LocalPlans(PlanSource, Protocol):
    """The local planner, which can be given a draft price and step times."""

    draft_price: float

    def adopt(self, round_time: RoundTimeModel) -> bool: ...


class CoordinatedPlanSource:
    """`plan` and `report` run on the round thread; the stream runs on an asyncio loop."""

    def __init__(
        self,
        scheduler: CoordinationApi,
        local: LocalPlans,
        profile: Sequence[StepTime],
        *,
        replica_id: str = "local",
        load: Callable[[], VerifierLoad | None] = lambda: None,
        kind: ReplicaKind | None = None,
        on_connected: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            profile: What this verifier measured at start; the scheduler refines it.
            load: Called on the event loop for every report and in between.
            kind: Replicas of this kind share step times that `local` may adopt.
            on_connected: Called when a scheduler begins to answer, since it may be a new leader that knows
                no replica yet.
        """
        self._scheduler = scheduler
        self._local = local
        self._profile = tuple(profile)
        self._replica_id = replica_id
        self._load = load
        self._kind = kind
        self._on_connected = on_connected
        self._clock = clock
        # (price, time of arrival); replaced as a whole by the loop, read by the round thread.
        self._price = (0.0, clock())
        self._loop = asyncio.get_running_loop()
        self._reports: asyncio.Queue[RoundReport] = asyncio.Queue(MAX_QUEUED_REPORTS)
        # Newest last; replaced as a whole by the loop, read by the round thread.
        self._plans: deque[VerifyPlan] = deque(maxlen=MAX_PLAN_AGE_ROUNDS)
        self._round = 0
        self._scaling: BandedScaling | None = None
        self._task: asyncio.Task[None] | None = None
        self.last_planner = LOCAL_PLANNER
        """Name of the planner that made the newest plan."""

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="coordinate")

    async def close(self) -> None:
        if self._task is not None:
            await end(self._task)
            self._task = None

    @property
    def newest_round(self) -> int:
        """The round on which the newest plan is based; 0 while there is none."""
        return self._plans[-1].based_on_round if self._plans else 0

    def cohorts(self, candidates: Sequence[DraftCandidate], given: int | None) -> int:
        self._charge_newest()
        return self._local.cohorts(candidates, given)

    def wants_draft(self, candidates: Sequence[DraftCandidate]) -> tuple[bool, ...]:
        self._charge_newest()
        return self._local.wants_draft(candidates)

    def _charge_newest(self) -> None:
        """Gives the local planner the current price. Like everything weighed against it, the price comes from
        completed rounds only."""
        price, received_at = self._price
        self._local.draft_price = faded(price, self._clock() - received_at)

    def plan(self, requests: Sequence[PlanRequest], capacity: int | None = None) -> tuple[int, ...]:
        requests = scaled(requests, self._scaling)
        plan = self._usable_plan() if follows_capacity(requests) else None
        if plan is None:
            self.last_planner = LOCAL_PLANNER
            return self._local.plan(requests, capacity)
        self.last_planner = SCHEDULER_PLANNER
        return self._local.plan(requests, plan.draft_token_capacity)

    def report(self, report: RoundReport) -> None:
        self._round = report.round
        self._local.report(report)
        with contextlib.suppress(RuntimeError):  # the loop is closed: the service is ending
            self._loop.call_soon_threadsafe(self._enqueue, report)

    def _usable_plan(self) -> VerifyPlan | None:
        """The newest plan that is old enough for the round being planned; None if even that is too old."""
        now = self._round + 1
        for plan in reversed(tuple(self._plans)):
            age = now - plan.based_on_round
            if age >= MIN_PLAN_AGE_ROUNDS:
                return plan if age <= MAX_PLAN_AGE_ROUNDS else None
        return None

    def _enqueue(self, report: RoundReport) -> None:
        if self._task is None:
            return
        if self._reports.full():
            self._reports.get_nowait()  # the scheduler cares most about the newest
        self._reports.put_nowait(report)

    async def _run(self) -> None:
        complaints: set[type[Exception]] = set()  # kinds of errors logged since the last plan
        while True:
            connected = False
            try:
                async with aclosing(self._scheduler.coordinate(self._drain_reports())) as plans:
                    async for plan in plans:
                        if not connected:
                            self._on_connected()
                        if complaints:
                            _log.info("plans from the scheduler are back")
                        connected = True
                        complaints.clear()
                        self._take(plan)
            except DSparkError as error:
                if type(error) not in complaints:
                    # A standby tells whom to ask instead.
                    level = logging.INFO if isinstance(error, NotLeaderError) else logging.WARNING
                    _log.log(level, "no plans from the scheduler, planning locally: %s", error)
                complaints.add(type(error))
            except Exception:
                # This task must not end before the verifier does: nothing else would reconnect.
                _log.exception("unexpected error while following the scheduler")
            self._plans.clear()
            await asyncio.sleep(RECONNECT_SECONDS)

    def _take(self, plan: VerifyPlan) -> None:
        self._price = (plan.draft_price, self._clock())
        if plan.based_on_round == 0:
            return  # a heartbeat: the scheduler has nothing to plan
        self._scaling = banded(plan.scalings)
        if plan.curve and self._local.adopt(adopted(plan.curve)):
            _log.info("took over step times of replicas of its kind: %d points", len(plan.curve))
        self._plans.append(plan)

    async def _drain_reports(self) -> AsyncIterator[RoundReport]:
        """Yields round reports, each with the current load; between rounds, load changes and keepalives."""
        profile, kind, sent, sent_at = self._profile, self._kind, None, 0.0
        while True:
            report = await self._next_report()
            load, now = self._load(), self._loop.time()
            if report is None:
                if load is None or (load == sent and now - sent_at < KEEPALIVE_SECONDS):
                    continue
                report = RoundReport(replica_id=self._replica_id, round=0)
            sent, sent_at = load, now
            yield dataclasses.replace(report, load=load, profile=profile, kind=kind)
            profile, kind = (), None

    async def _next_report(self) -> RoundReport | None:
        """None if no round ends within LOAD_SECONDS."""
        try:
            async with asyncio.timeout(LOAD_SECONDS):
                return await self._reports.get()
        except TimeoutError:
            return None
