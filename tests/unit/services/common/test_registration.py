"""A replica stays registered through lost schedulers, and leaves when it stops."""

import asyncio

import pytest

from dspark_core.errors import UnavailableError
from dspark_core.records import Replica, Role
from services.common.registration import RegistrationLoop
from tests.support.polling import eventually


class FakeScheduler:
    def __init__(self, lease_seconds: float = 0.03) -> None:
        self.lease_seconds = lease_seconds
        self.down = False
        self.attempts = 0
        self.registered: list[Replica] = []
        self.deregistered: list[str] = []

    async def register(self, replica: Replica) -> float:
        self.attempts += 1
        if self.down:
            raise UnavailableError("scheduler is gone")
        self.registered.append(replica)
        return self.lease_seconds

    async def deregister(self, replica_id: str) -> None:
        if self.down:
            raise UnavailableError("scheduler is gone")
        self.deregistered.append(replica_id)


def _replica(running: int = 0) -> Replica:
    return Replica(
        replica_id="v-1", role=Role.VERIFIER, address="127.0.0.1:1", model="m", running_requests=running
    )


async def test_every_renewal_carries_the_load_of_its_moment():
    scheduler, load = FakeScheduler(), iter(range(1000))
    loop = RegistrationLoop(scheduler, lambda: _replica(next(load)))
    loop.start()
    await eventually(lambda: len(scheduler.registered) >= 3)
    await loop.stop()
    assert [replica.running_requests for replica in scheduler.registered[:3]] == [0, 1, 2]
    assert scheduler.deregistered == ["v-1"]


async def test_it_registers_again_when_the_scheduler_is_back():
    scheduler = FakeScheduler()
    scheduler.down = True
    loop = RegistrationLoop(scheduler, _replica, max_backoff_seconds=0.01, jitter=lambda: 0.0)
    loop.start()
    await eventually(lambda: scheduler.attempts >= 3)
    assert not loop.registered
    scheduler.down = False
    async with asyncio.timeout(15):
        await loop.wait_registered()
    scheduler.down = True
    await eventually(lambda: not loop.registered)
    scheduler.down = False
    await eventually(lambda: loop.registered)
    await loop.stop()
    assert not loop.registered


async def test_a_fault_while_describing_does_not_end_the_loop(caplog: pytest.LogCaptureFixture):
    scheduler, faults = FakeScheduler(), iter([ZeroDivisionError("no pages")])

    def describe() -> Replica:
        for fault in faults:
            raise fault
        return _replica()

    loop = RegistrationLoop(scheduler, describe, max_backoff_seconds=0.01, jitter=lambda: 0.0)
    loop.start()
    await eventually(lambda: loop.registered)
    assert "no pages" in caplog.text
    await loop.stop()


async def test_stopping_without_a_scheduler_does_not_fail():
    scheduler = FakeScheduler()
    loop = RegistrationLoop(scheduler, _replica)
    loop.start()
    await eventually(lambda: loop.registered)
    scheduler.down = True
    await loop.stop()
    attempts = scheduler.attempts
    await asyncio.sleep(0)
    assert scheduler.attempts == attempts


async def test_a_change_can_be_told_before_the_lease_asks_for_it():
    scheduler = FakeScheduler(lease_seconds=3600)
    loop = RegistrationLoop(scheduler, _replica)
    loop.start()
    await eventually(lambda: len(scheduler.registered) == 1)
    loop.renew_soon()
    await eventually(lambda: len(scheduler.registered) == 2)
    await loop.stop(deregister=False)
    assert scheduler.deregistered == []
