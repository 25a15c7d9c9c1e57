"""Tells the scheduler of the rounds in its own process, and leaves planning where the rounds are.

A plan comes two rounds late, which pays when it brings what other verifiers know. Here there are no
others: the local planner has the same curve, floors and confidences, and has them at once.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable

from dspark_core.records import RoundReport, VerifyPlan
from services.scheduler.scheduler import Scheduler


class ReportsOnly:
    """The scheduler's side of a `CoordinatedPlanSource` that is sent no plans."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    async def coordinate(self, reports: AsyncIterable[RoundReport]) -> AsyncGenerator[VerifyPlan, None]:
        await self._scheduler.listen(reports)
        return
        yield  # an empty generator
