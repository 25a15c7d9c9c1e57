"""Who leads as the lock comes and goes, and what a scheduler does that does not."""

import asyncio
import logging

import pytest

from dspark_core.errors import ConfigError, NotLeaderError, UnavailableError
from dspark_core.records import AssignRequest, Replica, Role, RoundReport
from services.scheduler.leadership.election import Election, Leadership
from services.scheduler.scheduler import Scheduler
from services.scheduler.storage.documents import MemoryDocumentStore
from tests.support.polling import eventually

STANDBY = Leadership(leading=False, term=7, leader_address="other:50052")


class ScriptedLock:
    def __init__(self, now: Leadership | None) -> None:
        self.now = now
        self.fault: Exception | None = None
        """Raised once."""
        self.released = 0
        self.held = 0

    async def hold(self) -> Leadership:
        self.held += 1
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        if self.now is None:
            raise UnavailableError("redis does not answer")
        return self.now

    async def release(self) -> None:
        self.released += 1

    async def close(self) -> None:
        """Nothing is open."""


async def _changes(lock: ScriptedLock) -> tuple[Election, list[Leadership]]:
    seen: list[Leadership] = []

    async def changed(now: Leadership) -> None:
        seen.append(now)

    return Election(lock, renew_seconds=0.005, on_change=changed), seen


async def test_a_lock_that_cannot_be_reached_changes_nothing():
    lock = ScriptedLock(None)
    election, seen = await _changes(lock)
    await election.start()
    election.require_leading()  # nobody could be asked, and serving beats refusing
    lock.now = STANDBY
    await eventually(lambda: not election.now.leading)
    with pytest.raises(NotLeaderError, match="the leader is other:50052") as caught:
        election.require_leading()
    assert caught.value.leader_address == "other:50052"
    lock.now = None
    held = lock.held
    await eventually(lambda: lock.held > held + 2)
    assert not election.now.leading
    lock.now = Leadership(leading=True, term=8)
    await eventually(lambda: election.now.leading)
    await election.stop()
    assert [one.leading for one in seen] == [False, True]
    assert lock.released == 1


async def test_a_lock_that_is_lost_and_back_is_told_where_nothing_changes_too(caplog):
    caplog.set_level(logging.INFO)
    lock = ScriptedLock(STANDBY)
    election, _ = await _changes(lock)
    await election.start()
    lock.now = None
    await eventually(lambda: "cannot be reached" in caplog.text)
    lock.now = STANDBY
    held = lock.held
    await eventually(lambda: lock.held > held + 2)
    await election.stop()
    assert [one.getMessage() for one in caplog.records] == [
        "now standby (term 7)",
        "the leader lock cannot be reached, nothing changes: redis does not answer",
        "the leader lock can be reached",
    ]


async def test_an_unexpected_error_of_the_lock_ends_no_election(caplog):
    lock = ScriptedLock(STANDBY)
    election, seen = await _changes(lock)
    await election.start()
    lock.now, lock.fault = Leadership(leading=True, term=8), ValueError("no such answer")
    await eventually(lambda: election.now.leading)
    await election.stop()
    assert [one.term for one in seen] == [7, 8]
    assert "unexpected error while holding the leader lock" in caplog.text


@pytest.mark.parametrize("at_first", [None, STANDBY], ids=["out of reach", "reached"])
async def test_only_a_lock_that_was_never_reached_may_still_refuse(at_first: Leadership | None):
    """Who was told who leads goes on; who was not would lead for ever, beside others."""
    lock = ScriptedLock(at_first)
    election, _ = await _changes(lock)
    await election.start()
    refused = asyncio.create_task(election.until_refused())
    lock.fault = ConfigError("this scheduler may not")
    held = lock.held
    if at_first is None:
        with pytest.raises(ConfigError, match="may not"):
            await asyncio.wait_for(refused, 15)
    else:
        await eventually(lambda: lock.held > held + 2)
        assert election.now == STANDBY
        assert not refused.done()
    await election.stop()
    await asyncio.gather(refused, return_exceptions=True)


async def test_a_standby_that_stops_releases_nothing():
    lock = ScriptedLock(STANDBY)
    election, _ = await _changes(lock)
    await election.start()
    await election.stop()
    assert lock.released == 0


class HangingStore(MemoryDocumentStore):
    """Answers nothing from the second time on."""

    loads = 0

    async def load(self) -> dict[str, str]:
        self.loads += 1
        if self.loads > 1:
            await asyncio.Event().wait()
        return {}


async def test_a_store_that_hangs_keeps_no_leader_from_renewing_its_lock():
    lock, store = ScriptedLock(STANDBY), HangingStore()
    scheduler = Scheduler(lock=lock, curves=store, renew_seconds=0.005)
    await scheduler.start()
    lock.now = Leadership(leading=True, term=8)
    await eventually(lambda: store.loads == 2)
    held = lock.held
    await eventually(lambda: lock.held > held + 2)
    lock.now = STANDBY
    held = lock.held
    await eventually(lambda: lock.held > held + 2)
    lock.now = Leadership(leading=True, term=9)
    await eventually(lambda: store.loads == 3)  # what others stored meanwhile
    await asyncio.wait_for(scheduler.close(), 15)


async def test_a_scheduler_that_stops_leading_sends_everybody_to_the_new_leader():
    lock = ScriptedLock(Leadership(leading=True, term=6))
    scheduler = Scheduler(lock=lock, renew_seconds=0.005)
    await scheduler.start()
    await scheduler.register(Replica(replica_id="v", role=Role.VERIFIER, address="v:1", model="m"))
    assert (await scheduler.assign(AssignRequest(request_id="r", model="m"))).replica_id == "v"

    async def reports():
        await asyncio.Event().wait()
        yield RoundReport(replica_id="v", round=1)

    async def stream() -> list[object]:
        return [plan async for plan in scheduler.coordinate(reports())]

    open_stream = asyncio.create_task(stream())
    lock.now = STANDBY
    assert await asyncio.wait_for(open_stream, 15) == []  # ended, so that the verifier looks elsewhere
    for call in (
        scheduler.assign(AssignRequest(request_id="r", model="m")),
        scheduler.register(Replica(replica_id="w", role=Role.VERIFIER, address="w:1", model="m")),
        scheduler.deregister("v"),
        scheduler.list_replicas(),
        stream(),
    ):
        with pytest.raises(NotLeaderError, match="other:50052"):
            await call
    await scheduler.close()
