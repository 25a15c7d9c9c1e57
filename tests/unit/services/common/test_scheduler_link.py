"""A link follows the leader by its hints, tries everybody once, and says what the leader said."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator

import pytest

from dspark_core.errors import (
    DeadlineError,
    NotLeaderError,
    NoVerifierError,
    QueueFullError,
    UnavailableError,
)
from dspark_core.records import AssignRequest, Replica, Role, RoundReport, VerifyPlan
from services.common.scheduler_link import MAX_HINTED, MAX_OLDER_STREAMS, SchedulerLink
from tests.support.clock import ManualClock

ASSIGN = AssignRequest(request_id="r", model="m")


class FakeScheduler:
    def __init__(self, address: str) -> None:
        self.address = address
        self.error: Exception | None = None
        self.term = 0
        self.asked = 0
        self.closed = False

    @property
    def scheduler(self):
        return self

    async def close(self) -> None:
        self.closed = True

    async def assign(self, request: AssignRequest) -> Replica:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return Replica(replica_id="v", role=Role.VERIFIER, address=self.address, model="m")

    async def coordinate(self, reports: AsyncIterable[RoundReport]) -> AsyncIterator[VerifyPlan]:
        self.asked += 1
        if self.error is not None:
            raise self.error
        async for report in reports:
            yield VerifyPlan(based_on_round=report.round, draft_token_capacity=1, term=self.term)


class Schedulers(dict[str, FakeScheduler]):
    def connect(self, address: str) -> FakeScheduler:
        return self.setdefault(address, FakeScheduler(address))


@pytest.fixture
def schedulers() -> Schedulers:
    return Schedulers()


async def test_a_dead_scheduler_is_left_for_good(schedulers: Schedulers):
    link = SchedulerLink(("a", "b"), schedulers.connect)
    schedulers["a"].error = UnavailableError("connection refused")
    for _ in range(3):
        assert (await link.assign(ASSIGN)).address == "b"
    assert schedulers["a"].asked == 1


@pytest.mark.parametrize("error", [UnavailableError("gone"), DeadlineError("hangs")])
async def test_a_standby_that_names_the_leader_is_believed(schedulers: Schedulers, error: Exception):
    link = SchedulerLink(("service",), schedulers.connect)
    schedulers["service"].error = NotLeaderError("standby", leader_address="pod-1")
    assert (await link.assign(ASSIGN)).address == "pod-1"
    schedulers["pod-1"].error = error  # the leader is lost: back to the name that everybody is behind
    schedulers["service"].error = None
    assert (await link.assign(ASSIGN)).address == "service"


async def test_while_nobody_leads_each_is_asked_once_and_standbys_do_not_hide_the_reason(
    schedulers: Schedulers,
):
    link = SchedulerLink(("a", "b", "c"), schedulers.connect)
    for name in "ac":
        schedulers[name].error = NotLeaderError("standby", leader_address="b")
    schedulers["b"].error = UnavailableError("no verifier serves model 'm'")
    with pytest.raises(UnavailableError, match="no verifier serves"):
        await link.assign(ASSIGN)
    assert [schedulers[name].asked for name in "abc"] == [1, 1, 1]


async def test_an_answer_is_an_answer(schedulers: Schedulers):
    """Full means full: another scheduler must not be asked to let the request in after all."""
    link = SchedulerLink(("a", "b"), schedulers.connect)
    schedulers["a"].error = QueueFullError("full")
    with pytest.raises(QueueFullError):
        await link.assign(ASSIGN)
    assert schedulers["b"].asked == 0


async def test_hints_do_not_pile_up_connections(schedulers: Schedulers):
    link = SchedulerLink(("service",), schedulers.connect)
    for number in range(3 * MAX_HINTED):
        for other in schedulers.values():
            other.error = NotLeaderError("standby", leader_address=f"pod-{number}")
        assert (await link.assign(ASSIGN)).address == f"pod-{number}"
    still_open = [one for one in schedulers.values() if not one.closed]
    assert len(still_open) <= 1 + MAX_HINTED
    await link.close()
    assert all(one.closed for one in schedulers.values())


async def test_a_stream_that_fails_is_opened_elsewhere_next_time(schedulers: Schedulers):
    link = SchedulerLink(("a", "b"), schedulers.connect)
    schedulers["a"].error = NotLeaderError("standby")

    async def reports() -> AsyncIterator[RoundReport]:
        yield RoundReport(replica_id="v", round=7)

    with pytest.raises(NotLeaderError):
        [plan async for plan in link.coordinate(reports())]
    async with asyncio.timeout(15):
        assert [plan.based_on_round async for plan in link.coordinate(reports())] == [7]


async def one_report() -> AsyncIterator[RoundReport]:
    yield RoundReport(replica_id="v", round=7)


async def rounds_of(link: SchedulerLink) -> list[int]:
    return [plan.based_on_round async for plan in link.coordinate(one_report())]


async def test_a_leader_that_was_replaced_is_left_for_the_one_of_the_newer_term(schedulers: Schedulers):
    link = SchedulerLink(("a", "b"), schedulers.connect)
    schedulers["b"].term, schedulers["a"].term = 8, 7
    schedulers["a"].error = UnavailableError("not now")
    with pytest.raises(UnavailableError, match="not now"):
        await rounds_of(link)
    assert await rounds_of(link) == [7]  # of b
    schedulers["a"].error, schedulers["b"].error = None, UnavailableError("cut off")
    with pytest.raises(UnavailableError, match="cut off"):
        await rounds_of(link)
    with pytest.raises(UnavailableError, match="a leads by a term that is over"):
        await rounds_of(link)
    schedulers["b"].error = None
    assert (await link.assign(ASSIGN)).address == "b"


async def test_a_leader_whose_term_stays_older_is_believed_in_the_end(
    schedulers: Schedulers, caplog: pytest.LogCaptureFixture
):
    link = SchedulerLink(("a",), schedulers.connect)
    schedulers["a"].term = 1795961651000001
    assert await rounds_of(link) == [7]
    schedulers["a"].term = 3  # elected otherwise, or by a clock that was set back
    for _ in range(MAX_OLDER_STREAMS):
        with pytest.raises(UnavailableError, match="over"):
            await rounds_of(link)
    assert await rounds_of(link) == [7]
    assert "following the scheduler at a, whose term 3 is older" in caplog.text
    schedulers["a"].term = 4
    assert await rounds_of(link) == [7]


async def test_a_scheduler_that_falls_silent_is_left_and_connected_to_anew():
    connections: list[FakeScheduler] = []

    def connect(address: str) -> FakeScheduler:
        connections.append(FakeScheduler(address))
        return connections[-1]

    async def reports() -> AsyncIterator[RoundReport]:
        yield RoundReport(replica_id="v", round=7)
        await asyncio.Event().wait()  # and no plan for it comes either

    link = SchedulerLink(("service",), connect, silence_seconds=0.02)
    plans = link.coordinate(reports())
    assert (await anext(plans)).based_on_round == 7
    with pytest.raises(DeadlineError, match="service said nothing for"):
        await anext(plans)
    assert [one.closed for one in connections] == [False, False]  # calls on the old one may still end
    assert (await link.assign(ASSIGN)).address == "service"
    assert [one.asked for one in connections] == [1, 1]
    await link.close()
    assert all(one.closed for one in connections)


async def test_waiting_for_ones_turn_ends_when_the_scheduler_hangs(schedulers: Schedulers):
    class Hung(FakeScheduler):
        async def assign(self, request: AssignRequest) -> Replica:
            await asyncio.Event().wait()
            raise AssertionError

        async def list_replicas(self, role: Role | None = None) -> tuple[Replica, ...]:
            raise DeadlineError("hangs")

    schedulers["a"] = Hung("a")
    link = SchedulerLink(("a", "b"), schedulers.connect, patience_seconds=0.01)
    async with asyncio.timeout(15):
        assert (await link.assign(ASSIGN)).address == "b"


@pytest.mark.parametrize(
    "error", [NoVerifierError("no verifier serves model 'm' now"), NotLeaderError("standby, whoever leads")]
)
async def test_a_name_is_connected_to_anew_when_the_scheduler_behind_it_cannot_help(error: Exception):
    """As behind a Service, while a scheduler that started without Redis leads beside the real leader."""
    connections: list[FakeScheduler] = []

    def connect(address: str) -> FakeScheduler:
        connections.append(FakeScheduler(address))
        connections[-1].error = error if len(connections) <= 2 else None
        return connections[-1]

    clock = ManualClock()
    link = SchedulerLink(("service",), connect, clock=clock)
    for asked in ([1, 0], [1, 1], [1, 2]):  # the last comes too soon for a third connection
        with pytest.raises(type(error)):
            await link.assign(ASSIGN)
        assert [one.asked for one in connections] == asked
    clock.advance(1.0)
    with pytest.raises(type(error)):
        await link.assign(ASSIGN)
    assert (await link.assign(ASSIGN)).address == "service"
    assert len(connections) == 3
    await link.close()
    assert all(one.closed for one in connections)


async def test_a_stream_to_a_leader_of_an_older_term_is_opened_on_a_new_connection():
    connections: list[FakeScheduler] = []

    def connect(address: str) -> FakeScheduler:
        connections.append(FakeScheduler(address))
        connections[-1].term = 7
        return connections[-1]

    link = SchedulerLink(("service",), connect)
    assert await rounds_of(link) == [7]
    connections[0].term = 0  # restarted without Redis
    with pytest.raises(UnavailableError, match="over"):
        await rounds_of(link)
    assert await rounds_of(link) == [7]
    assert [one.asked for one in connections] == [2, 1]
