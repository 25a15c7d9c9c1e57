"""A report is proof of life: it keeps a registered verifier, and brings none back that left."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from dspark_core.records import Replica, ReplicaKind, RoundReport, VerifierLoad
from services.scheduler.scheduler import Scheduler
from services.scheduler.storage.registry import MemoryRegistry
from tests.support.clock import ManualClock
from tests.support.polling import eventually
from tests.support.replicas import new_replica

LEASE_SECONDS = 10.0
SMALL = ReplicaKind(model="small", engine="native", hardware="cpu", dtype="float32")
LARGE = ReplicaKind(model="large", engine="native", hardware="cpu", dtype="float32")


class HeldRegistry(MemoryRegistry):
    """Counts what is stored; while `hold` is cleared, what is to be stored is on its way."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.puts = 0
        self.hold = asyncio.Event()
        self.hold.set()

    async def put(self, replica: Replica, lease_seconds: float) -> None:
        self.puts += 1
        await self.hold.wait()
        await super().put(replica, lease_seconds)


class Reports:
    """A Coordinate stream that is spoken on by hand."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._sent: asyncio.Queue[RoundReport] = asyncio.Queue()
        self._task = asyncio.create_task(scheduler.listen(self._stream()))
        self._taken = 0
        self._put = 0

    async def _stream(self) -> AsyncIterator[RoundReport]:
        while True:
            report = await self._sent.get()
            yield report
            self._taken += 1  # it asks for the next one: this one is done

    async def say(self) -> None:
        self.begin()
        await eventually(lambda: self._taken == self._put)

    def begin(self) -> None:
        self._put += 1
        self._sent.put_nowait(RoundReport(replica_id="v", round=0, load=VerifierLoad()))

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def registry(clock: ManualClock) -> HeldRegistry:
    return HeldRegistry(clock)


@pytest.fixture
async def scheduler(clock: ManualClock, registry: HeldRegistry) -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(lease_seconds=LEASE_SECONDS, registry=registry, sync_seconds=0.005, clock=clock)
    await scheduler.start()
    yield scheduler
    await scheduler.close()


@pytest.fixture
async def reports(scheduler: Scheduler) -> AsyncIterator[Reports]:
    reports = Reports(scheduler)
    yield reports
    await reports.close()


async def _ids(listing: Scheduler | HeldRegistry) -> list[str]:
    found = await (listing.list_replicas() if isinstance(listing, Scheduler) else listing.replicas())
    return [replica.replica_id for replica in found]


async def test_reports_keep_a_verifier_whose_renewals_do_not_get_through(
    scheduler: Scheduler, registry: HeldRegistry, clock: ManualClock, reports: Reports
):
    await scheduler.register(new_replica("v"))
    for _ in range(4):
        clock.advance(0.6 * LEASE_SECONDS)
        await reports.say()
        assert await _ids(scheduler) == ["v"]
        assert await _ids(registry) == ["v"]  # other schedulers know it as well
    clock.advance(LEASE_SECONDS)
    assert await _ids(scheduler) == await _ids(registry) == []


async def test_the_registry_is_not_told_of_every_report(
    scheduler: Scheduler, registry: HeldRegistry, clock: ManualClock, reports: Reports
):
    await scheduler.register(new_replica("v"))
    for _ in range(40):
        clock.advance(LEASE_SECONDS / 20)
        await reports.say()
    assert registry.puts <= 1 + 4  # two leases long, at most every half of one


async def test_reports_bring_nobody_back(
    scheduler: Scheduler, registry: HeldRegistry, clock: ManualClock, reports: Reports
):
    await reports.say()
    assert await _ids(scheduler) == []  # never registered
    await scheduler.register(new_replica("v"))
    await reports.say()
    await scheduler.deregister("v")
    await reports.say()
    assert await _ids(scheduler) == await _ids(registry) == []
    await scheduler.register(new_replica("v"))
    clock.advance(LEASE_SECONDS)  # nobody looked meanwhile
    await reports.say()
    assert await _ids(scheduler) == await _ids(registry) == []


async def test_who_leaves_while_a_report_renews_it_in_the_registry_stays_away(
    scheduler: Scheduler, registry: HeldRegistry, clock: ManualClock, reports: Reports
):
    await scheduler.register(new_replica("v"))
    clock.advance(0.6 * LEASE_SECONDS)
    registry.hold.clear()
    reports.begin()
    await eventually(lambda: registry.puts == 2)
    await scheduler.deregister("v")
    registry.hold.set()  # it is stored after it was removed
    await reports.say()
    assert await _ids(scheduler) == await _ids(registry) == []
