"""Reports rounds to the scheduler in the same process, and leaves planning to the verifier.

A scheduler's plan arrives two rounds late, which pays if it carries what other verifiers know. Here there are
no others: the local planner has the same curve, floors and confidences without the delay.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable

from dspark_core.records import RoundReport, VerifyPlan
from services.scheduler.scheduler import Scheduler


class ReportsOnly:
    """A scheduler that takes a `CoordinatedPlanSource`'s reports and sends it no plans."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    async def coordinate(self, reports: AsyncIterable[RoundReport]) -> AsyncGenerator[VerifyPlan, None]:
        await self._scheduler.listen(reports)
        return
        yield  # an empty generator
