"""Requests that wait are tried again after reports, but not for more of the time than that is worth."""

import asyncio
import time

from prometheus_client import CollectorRegistry

from dspark_core.records import AssignRequest, Replica, Role
from services.scheduler.admission import PUMP_SHARE, FloorAdmission
from services.scheduler.metrics import SchedulerMetrics
from tests.support.polling import eventually

VERIFIER = Replica(replica_id="v", role=Role.VERIFIER, address="v:1", model="m")


class SlowFleet:
    """Looks long for a verifier, as a large one does, and finds none while it is `full`."""

    full = True
    asked = 0

    def assign(self, request: AssignRequest) -> Replica | None:
        self.asked += 1
        time.sleep(0.002)
        return None if self.full else VERIFIER


async def test_reports_without_end_leave_most_of_the_time_to_others() -> None:
    fleet = SlowFleet()
    admission = FloorAdmission(
        fleet.assign,
        SchedulerMetrics(CollectorRegistry()),
        within_reach=lambda request: True,
        max_waiting=4,
        clock=time.monotonic,
    )
    waiting = asyncio.create_task(
        admission.admit(AssignRequest(request_id="r", model="m", wait_seconds=60.0))
    )
    await eventually(lambda: fleet.asked == 1)
    began, reports = time.monotonic(), 0
    while fleet.asked < 6:
        admission.pump_soon()
        reports += 1
        await asyncio.sleep(0)
    assert time.monotonic() - began >= 4 * 0.002 / PUMP_SHARE
    assert reports > 20
    fleet.full = False
    admission.pump_soon()  # the last report before a silence counts as well
    assert await asyncio.wait_for(waiting, 15) is VERIFIER
