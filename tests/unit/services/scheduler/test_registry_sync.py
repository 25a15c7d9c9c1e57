"""A registry that goes away costs nothing that is known, and gets everything when it is back."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry

from dspark_core.errors import UnavailableError
from dspark_core.records import AssignRequest, Replica
from services.scheduler.scheduler import Scheduler
from services.scheduler.storage.registry import MemoryRegistry
from tests.support.clock import ManualClock
from tests.support.polling import eventually
from tests.support.replicas import new_replica

LEASE_SECONDS = 10.0


class HeldListing:
    """A listing that was taken but not delivered yet, as over a slow network."""

    def __init__(self) -> None:
        self.taken = asyncio.Event()
        self.deliver = asyncio.Event()


class UnsteadyRegistry:
    """A registry that can be taken away; counts what reached it."""

    def __init__(self, clock: ManualClock) -> None:
        self.inner = MemoryRegistry(clock)
        self.down = False
        self.reads = 0
        self.failed = 0
        self.held: HeldListing | None = None

    async def put(self, replica: Replica, lease_seconds: float) -> None:
        self._check()
        await self.inner.put(replica, lease_seconds)

    async def remove(self, replica_id: str) -> None:
        self._check()
        await self.inner.remove(replica_id)

    async def replicas(self) -> tuple[Replica, ...]:
        self._check()
        listed = await self.inner.replicas()
        if self.held is not None:
            self.held.taken.set()
            await self.held.deliver.wait()
        self.reads += 1
        return listed

    def hold_listings(self) -> HeldListing:
        self.held = HeldListing()
        return self.held

    async def close(self) -> None:
        await self.inner.close()

    def _check(self) -> None:
        if self.down:
            self.failed += 1
            raise UnavailableError("registry is gone")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def registry(clock: ManualClock) -> UnsteadyRegistry:
    return UnsteadyRegistry(clock)


@pytest.fixture
def metrics() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
async def scheduler(
    registry: UnsteadyRegistry, clock: ManualClock, metrics: CollectorRegistry
) -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(
        lease_seconds=LEASE_SECONDS, registry=registry, sync_seconds=0.005, metrics=metrics, clock=clock
    )
    await scheduler.start()
    yield scheduler
    await scheduler.close()


async def _ids(scheduler: Scheduler) -> list[str]:
    return [replica.replica_id for replica in await scheduler.list_replicas()]


async def _next_read(registry: UnsteadyRegistry) -> None:
    reads = registry.reads
    await eventually(lambda: registry.reads >= reads + 2)


async def test_replicas_of_other_schedulers_appear_and_go(scheduler: Scheduler, registry: UnsteadyRegistry):
    await registry.inner.put(new_replica("elsewhere"), LEASE_SECONDS)
    await _next_read(registry)
    assert await _ids(scheduler) == ["elsewhere"]
    await registry.inner.remove("elsewhere")
    await _next_read(registry)
    assert await _ids(scheduler) == []


async def test_an_outage_costs_nothing_known_and_own_leases_still_run_out(
    scheduler: Scheduler, registry: UnsteadyRegistry, clock: ManualClock, metrics: CollectorRegistry
):
    await registry.inner.put(new_replica("elsewhere"), LEASE_SECONDS)
    await scheduler.register(new_replica("own"))
    await _next_read(registry)
    registry.down = True
    await eventually(lambda: registry.failed >= 2)
    assert metrics.get_sample_value("dspark_scheduler_registry_up") == 0
    await scheduler.register(new_replica("new"))
    assert await _ids(scheduler) == ["elsewhere", "new", "own"]
    clock.advance(LEASE_SECONDS)
    assert await _ids(scheduler) == ["elsewhere"]


async def test_writes_do_not_wait_for_a_registry_known_to_be_down(
    scheduler: Scheduler, registry: UnsteadyRegistry
):
    registry.down = True
    await eventually(lambda: registry.failed >= 1)
    failed = registry.failed
    assert await scheduler.register(new_replica("own")) == LEASE_SECONDS
    await scheduler.deregister("own")
    assert registry.failed == failed


async def test_a_registry_that_comes_back_empty_gets_every_own_lease_again(
    scheduler: Scheduler, registry: UnsteadyRegistry, clock: ManualClock, metrics: CollectorRegistry
):
    await scheduler.register(new_replica("own"))
    await scheduler.register(new_replica("left"))
    registry.down = True
    await eventually(lambda: registry.failed >= 1)
    await scheduler.deregister("left")
    await registry.inner.remove("own")  # lost with the restart; "left" is still there
    registry.down = False
    await _next_read(registry)
    assert [replica.replica_id for replica in await registry.inner.replicas()] == ["own"]
    assert await _ids(scheduler) == ["own"]
    assert metrics.get_sample_value("dspark_scheduler_registry_up") == 1


async def test_a_listing_asked_for_before_a_replica_left_does_not_bring_it_back(
    scheduler: Scheduler, registry: UnsteadyRegistry
):
    await scheduler.register(new_replica("own"))
    await _next_read(registry)
    listing = registry.hold_listings()
    await listing.taken.wait()  # a listing with "own" is on its way
    await scheduler.deregister("own")
    listing.deliver.set()
    reads = registry.reads
    while registry.reads < reads + 3:
        assert await _ids(scheduler) == []
        await asyncio.sleep(0)
    await scheduler.register(new_replica("own"))
    assert await _ids(scheduler) == ["own"]


async def test_starting_without_a_registry_works(registry: UnsteadyRegistry, clock: ManualClock):
    registry.down = True
    scheduler = Scheduler(registry=registry, clock=clock)
    await scheduler.start()
    await scheduler.register(new_replica("own"))
    assert (await scheduler.assign(AssignRequest(request_id="r", model="m"))).replica_id == "own"
    await scheduler.close()


async def test_replicas_are_counted_by_role(scheduler: Scheduler, metrics: CollectorRegistry):
    await scheduler.register(new_replica("own"))
    assert metrics.get_sample_value("dspark_scheduler_replicas", {"role": "verifier"}) == 1
    assert metrics.get_sample_value("dspark_scheduler_replicas", {"role": "drafter"}) == 0
    await scheduler.deregister("own")
    assert metrics.get_sample_value("dspark_scheduler_replicas", {"role": "verifier"}) == 0
