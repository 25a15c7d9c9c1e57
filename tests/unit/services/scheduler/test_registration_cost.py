"""Replicas that come, go and renew cost little of the scheduler's time."""

import asyncio
import time
from collections import Counter

import pytest

from dspark_core.cluster.fleet import Fleet
from dspark_core.records import AssignRequest
from services.scheduler.metrics import SchedulerMetrics
from services.scheduler.scheduler import Scheduler
from tests.support.polling import eventually
from tests.support.replicas import new_replica


async def test_registrations_leave_most_of_the_time_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Counter[str]()

    def slow(self: Fleet, request: AssignRequest) -> None:
        asked["verifiers"] += 1
        time.sleep(0.002)

    monkeypatch.setattr(Fleet, "assign", slow)
    scheduler = Scheduler()
    await scheduler.start()
    waiting = asyncio.create_task(
        scheduler.assign(AssignRequest(request_id="r", model="m", wait_seconds=60.0))
    )
    await eventually(lambda: asked["verifiers"] == 1)
    for number in range(20):
        await scheduler.register(new_replica(f"v{number}"))
        await scheduler.deregister(f"v{number}")
    assert asked["verifiers"] < 10
    waiting.cancel()
    await scheduler.close()


async def test_a_renewal_that_changes_nothing_is_not_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counter[str]()
    monkeypatch.setattr(SchedulerMetrics, "set_replicas", lambda self, replicas: counted.update(["times"]))
    scheduler = Scheduler(sync_seconds=60.0)
    await scheduler.start()
    await scheduler.register(new_replica("v"))
    shown = counted["times"]
    for running in range(10):
        await scheduler.register(new_replica("v", running_requests=running))
    assert counted["times"] == shown
    await scheduler.register(new_replica("v", weights="other"))
    assert counted["times"] == shown + 1
    await scheduler.close()
