"""Who holds a lease, judged by changes and one's own clock; and what conflicts do."""

from dataclasses import replace

import pytest

from dspark_core.errors import ConfigError, UnavailableError
from services.scheduler.leadership.lease_lock import KubernetesLeaderLock, Lease, LeaseConflictError
from tests.support.clock import ManualClock


class MemoryLeases:
    """One lease with versions, as an API server keeps it."""

    def __init__(self) -> None:
        self.lease: Lease | None = None
        self.created_seconds = 1_700_000_000
        self.version = 0
        self.conflicts = 0
        """So many writes of others come first."""
        self.failure: Exception | None = None
        self.writes: list[str] = []

    async def get(self) -> Lease | None:
        if self.failure:
            raise self.failure
        return self.lease

    async def create(self, lease: Lease) -> Lease:
        if self.lease is not None:
            raise LeaseConflictError("there is one")
        self.created_seconds += 1
        return self._write("create", replace(lease, created_seconds=self.created_seconds))

    async def replace(self, lease: Lease) -> Lease:
        if self.failure:
            raise self.failure
        if self.conflicts:
            self.conflicts -= 1
            self.edited()
        if self.lease is None or self.lease.version != lease.version:
            raise LeaseConflictError("not that version")
        return self._write("update", replace(lease, created_seconds=self.lease.created_seconds))

    def edited(self) -> None:
        """Something else about it changed."""
        assert self.lease is not None
        self.version += 1
        self.lease = replace(self.lease, version=str(self.version))

    def _write(self, verb: str, lease: Lease) -> Lease:
        self.writes.append(verb)
        self.version += 1
        self.lease = replace(lease, version=str(self.version), renewals=f"at {self.version}")
        return self.lease

    async def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def leases() -> MemoryLeases:
    return MemoryLeases()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def lock(leases: MemoryLeases, clock: ManualClock):
    def make(holder: str, seconds: float = 2.0) -> KubernetesLeaderLock:
        return KubernetesLeaderLock(
            leases, holder=holder, address=f"{holder}:1", lock_seconds=seconds, clock=clock
        )

    return make


async def test_the_first_makes_the_lease_and_the_second_stands_by(lock, leases: MemoryLeases):
    first, second = lock("a"), lock("b")
    now = await first.hold()
    assert (now.leading, now.leader_address) == (True, "a:1")
    assert leases.writes == ["create", "update"]  # the right to update shows at once
    assert await first.hold() == now
    told = await second.hold()
    assert (told.leading, told.term, told.leader_address) == (False, now.term, "a:1")


async def test_a_silent_holder_is_replaced_after_its_time_by_the_observer_s_clock(lock, clock: ManualClock):
    first, second = lock("a"), lock("b")
    held = await first.hold()
    for _ in range(8):  # a live one is never replaced, whatever its own clock writes
        clock.advance(1.9)
        assert (await first.hold()).leading
        assert not (await second.hold()).leading
    clock.advance(1.9)
    assert not (await second.hold()).leading
    clock.advance(0.2)
    taken = await second.hold()
    assert taken.leading
    assert taken.term > held.term
    # The first one wakes up: its renewal meets another version.
    woken = await first.hold()
    assert (woken.leading, woken.leader_address) == (False, "b:1")


async def test_whoever_comes_later_waits_the_whole_time(lock, clock: ManualClock):
    await lock("a").hold()
    clock.advance(100.0)  # the new one cannot know how long the holder has been silent
    late = lock("b")
    assert not (await late.hold()).leading
    clock.advance(1.99)
    assert not (await late.hold()).leading
    clock.advance(0.02)
    assert (await late.hold()).leading


async def test_the_time_is_the_one_the_holder_promised(lock, clock: ManualClock):
    await lock("a", 4.2).hold()
    other = lock("b", 1.0)
    await other.hold()
    clock.advance(4.9)
    assert not (await other.hold()).leading
    clock.advance(0.2)
    assert (await other.hold()).leading


async def test_edits_of_others_are_no_sign_of_life(lock, leases: MemoryLeases, clock: ManualClock):
    await lock("a").hold()
    other = lock("b")
    for _ in range(3):
        assert not (await other.hold()).leading
        leases.edited()
        clock.advance(0.7)
    assert (await other.hold()).leading


async def test_a_released_lease_is_taken_at_once_with_a_later_term(lock):
    first, second = lock("a"), lock("b")
    held = await first.hold()
    assert not (await second.hold()).leading
    await first.release()
    taken = await second.hold()
    assert taken.leading
    assert taken.term > held.term
    await first.release()  # not its own any more
    assert (await second.hold()).leading


async def test_a_release_meets_an_edit(lock, leases: MemoryLeases):
    one = lock("a")
    await one.hold()
    leases.conflicts = 1
    await one.release()
    assert (await lock("b").hold()).leading


async def test_an_edit_between_renewals_is_no_loss_of_the_lease(lock, leases: MemoryLeases):
    one = lock("a")
    now = await one.hold()
    leases.conflicts = 1
    assert await one.hold() == now


async def test_endless_conflicts_end_as_a_standby(lock, leases: MemoryLeases):
    one = lock("a")
    await one.hold()
    leases.conflicts = 100
    assert not (await one.hold()).leading


async def test_of_two_that_want_it_one_gets_it(lock, leases: MemoryLeases, clock: ManualClock):
    await lock("a").hold()
    second, third = lock("b"), lock("c")
    await second.hold()
    await third.hold()
    clock.advance(2.1)
    # The third reads before the second writes, and writes after it.
    stale = leases.lease
    assert (await second.hold()).leading
    fresh, leases.lease = leases.lease, stale
    look = third._look  # what it saw

    async def looked_earlier() -> Lease | None:
        seen = await look()
        leases.lease = fresh
        return seen

    third._look = looked_earlier
    told = await third.hold()
    assert (told.leading, told.leader_address) == (False, "b:1")


async def test_terms_grow_over_a_lease_that_was_emptied(lock, leases: MemoryLeases):
    """As `helm upgrade --force` does, which writes the lease as the chart renders it."""
    one = lock("a")
    for _ in range(4):
        held = await one.hold()
        await one.release()
    assert leases.lease is not None
    leases.lease = replace(leases.lease, holder="", address="", transitions=0, version="another")
    again = await one.hold()
    assert again.leading
    assert again.term > held.term


async def test_terms_grow_over_a_lease_that_was_deleted(lock, leases: MemoryLeases):
    one = lock("a")
    before = await one.hold()
    leases.lease = None
    after = await one.hold()
    assert after.leading
    assert after.term > before.term
    leases.lease = None
    leases.created_seconds -= 1  # made anew within the same second
    again = await one.hold()
    assert again.term > after.term


@pytest.mark.parametrize("failure", [UnavailableError("no answer"), ConfigError("no right")])
async def test_failures_reach_the_caller_and_a_renewal_goes_on_afterwards(lock, leases, failure):
    one = lock("a")
    now = await one.hold()
    leases.failure = failure
    with pytest.raises(type(failure)):
        await one.hold()
    leases.failure = None
    assert await one.hold() == now
