"""Nobody is let in who would break a speed floor; who cannot be let in waits, within bounds."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from dspark_core.errors import InvalidRequestError, NotLeaderError, QueueFullError, UnavailableError
from dspark_core.records import (
    AssignRequest,
    Replica,
    RequestSurvival,
    Role,
    RoundReport,
    StepTime,
    VerifierLoad,
)
from services.scheduler.leadership.election import LeaderLock, Leadership
from services.scheduler.scheduler import Scheduler
from tests.support.clock import ManualClock
from tests.unit.services.scheduler.test_election import ScriptedLock

# One request: 10 ms a round, 100 tokens/s without drafts; each further one 2 ms more.
LINE = tuple(
    StepTime(requests=n, batch_tokens=n, context_tokens=0, seconds=0.008 + 0.002 * n) for n in (1, 2, 8, 32)
)


class Cluster:
    """A scheduler, and verifiers that tell loads when the test says so."""

    def __init__(self, *names: str, max_waiting: int = 4, lock: LeaderLock | None = None) -> None:
        self.metrics = CollectorRegistry()
        self.clock = ManualClock()
        self.scheduler = Scheduler(
            max_waiting=max_waiting, metrics=self.metrics, clock=self.clock, lock=lock, renew_seconds=0.005
        )
        self._names = names
        self._reports: dict[str, asyncio.Queue[RoundReport]] = {name: asyncio.Queue() for name in names}
        self._streams = [asyncio.create_task(self._stream(name)) for name in names]
        self._asked = 0

    async def _stream(self, name: str) -> None:
        async def reports():
            while True:
                yield await self._reports[name].get()

        async for _ in self.scheduler.coordinate(reports()):
            pass

    async def start(self) -> None:
        for name in self._names:
            await self.scheduler.register(
                Replica(replica_id=name, role=Role.VERIFIER, address=f"{name}:1", model="m")
            )
            await self.tell(name)

    async def tell(self, name: str, running: int = 0, *floors: float, new: tuple[str, ...] = ()) -> None:
        load = VerifierLoad(running_requests=running, speed_floors=floors, new_request_ids=new)
        self._reports[name].put_nowait(RoundReport(replica_id=name, round=0, load=load, profile=LINE))
        for _ in range(5):
            await asyncio.sleep(0)

    async def work(self, name: str, *, rounds: range, seconds: float) -> None:
        """Rounds of one request."""
        request = RequestSurvival(sequence_id="s", survival=(), verify_length=0, accepted=0)
        for number in rounds:
            self._reports[name].put_nowait(
                RoundReport(
                    replica_id=name, round=number, requests=(request,), batch_tokens=1, step_seconds=seconds
                )
            )
            self.clock.advance(seconds)
            for _ in range(5):
                await asyncio.sleep(0)

    async def ask(
        self, floor: float = 0.0, *, promised: bool = True, tier: str = "", wait: float = 0.0
    ) -> str:
        self._asked += 1
        request = AssignRequest(
            request_id=f"r{self._asked}",
            model="m",
            min_tokens_per_second=floor,
            floor_promised=promised,
            tier=tier,
            wait_seconds=wait,
        )
        return (await self.scheduler.assign(request)).replica_id

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.get_sample_value(f"dspark_scheduler_{name}", labels)

    async def close(self) -> None:
        for stream in self._streams:
            stream.cancel()
        await asyncio.gather(*self._streams, return_exceptions=True)
        await self.scheduler.close()


@pytest.fixture
async def one():
    cluster = Cluster("v")
    await cluster.start()
    yield cluster
    await cluster.close()


@pytest.fixture
async def two():
    cluster = Cluster("a", "b")
    await cluster.start()
    yield cluster
    await cluster.close()


async def test_the_most_requests_at_which_floors_hold_are_let_in_and_not_one_more(one: Cluster) -> None:
    # 1 / (8 ms + 2 ms n) >= 1.05 * 40 up to n = 7.
    for _ in range(7):
        await one.ask(40.0)
    await one.scheduler.examine_floors()
    assert one.metric("floor_concurrency") == 7
    with pytest.raises(QueueFullError, match="without breaking a speed floor") as caught:
        await one.ask(40.0)
    assert caught.value.retry_after_seconds == 1.0  # how fast the queue moves is not known yet
    assert one.metric("assigns_total", tier="default", result="refused") == 1


async def test_floors_are_looked_at_while_others_have_their_turn_and_verifiers_leave(two: Cluster) -> None:
    await two.tell("a", 1, 40.0)
    await two.tell("b", 1, 40.0)
    looking = asyncio.create_task(two.scheduler.examine_floors())
    await asyncio.sleep(0)
    assert two.metric("floor_concurrency") == 0  # a scrape itself looks at nothing
    await two.scheduler.deregister("b")
    await looking
    assert two.metric("floor_concurrency") == 7


async def test_requests_without_a_floor_may_not_break_that_of_others(one: Cluster) -> None:
    await one.tell("v", 7, 40.0)
    with pytest.raises(QueueFullError):
        await one.ask()
    await one.tell("v", running=7)  # nobody was promised anything: no limit but the verifier's own
    for _ in range(50):
        await one.ask()


async def test_a_request_waits_until_a_running_one_ends(one: Cluster) -> None:
    await one.tell("v", 7, 40.0)
    waiting = asyncio.create_task(one.ask(40.0, wait=30.0))
    await asyncio.sleep(0)
    assert one.metric("waiting_requests", tier="default") == 1
    await one.tell("v", 7, 40.0)
    assert not waiting.done()
    await one.tell("v", 6, 40.0)
    assert await asyncio.wait_for(waiting, 15) == "v"
    assert one.metric("waiting_requests", tier="default") == 0


async def test_the_queue_is_first_come_first_served_and_bounded_by_tier(one: Cluster) -> None:
    await one.tell("v", 7, 40.0)
    ended: list[int] = []

    async def wait(number: int) -> None:
        await one.ask(40.0, tier="gold", wait=30.0)
        ended.append(number)

    tasks = []
    for number in range(4):
        tasks.append(asyncio.create_task(wait(number)))
        await asyncio.sleep(0)
    with pytest.raises(QueueFullError, match="4 of tier 'gold' wait"):
        await one.ask(40.0, tier="gold", wait=30.0)
    other = asyncio.create_task(one.ask(tier="silver", wait=30.0))  # another tier has room of its own
    await asyncio.sleep(0)
    assert not other.done()
    await one.tell("v", 3, 40.0)  # four places: three for those of gold, who take turns with silver
    assert ended == [0, 1, 2]
    await one.tell("v", running=0)
    await asyncio.wait_for(asyncio.gather(*tasks, other), 15)
    assert ended == [0, 1, 2, 3]


async def test_those_who_wait_hear_that_another_scheduler_leads() -> None:
    lock = ScriptedLock(Leadership(leading=True, term=1))
    cluster = Cluster("v", lock=lock)
    await cluster.scheduler.start()
    await cluster.start()
    await cluster.tell("v", 7, 40.0)
    waiting = asyncio.create_task(cluster.ask(40.0, wait=30.0))
    await asyncio.sleep(0)
    lock.now = Leadership(leading=False, term=2, leader_address="other:50052")
    with pytest.raises(NotLeaderError) as caught:
        await asyncio.wait_for(waiting, 15)
    assert caught.value.leader_address == "other:50052"
    await cluster.close()


async def test_tiers_that_nobody_waits_in_make_room_for_others(one: Cluster) -> None:
    """As where they have been renamed."""
    await one.tell("v", 7, 40.0)
    waiting = asyncio.create_task(one.ask(40.0, tier="gold", wait=30.0))
    await asyncio.sleep(0)
    for number in range(100):
        with pytest.raises(QueueFullError):
            await one.ask(40.0, tier=f"t{number}")
    assert one.metric("waiting_requests", tier="gold") == 1
    await one.tell("v", 6, 40.0)
    assert await asyncio.wait_for(waiting, 15) == "v"


async def test_nobody_overtakes_those_who_wait_in_the_same_tier(one: Cluster) -> None:
    await one.tell("v", 3, 40.0)
    waiting = asyncio.create_task(one.ask(80.0, wait=30.0))
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError, match="1 of tier 'default' wait"):
        await one.ask()
    assert await one.ask(tier="gold") == "v"
    await one.tell("v", new=("r3",))
    assert await asyncio.wait_for(waiting, 15) == "v"


async def test_who_is_refused_hears_how_fast_the_queue_moves(one: Cluster) -> None:
    await one.tell("v", 7, 40.0)
    tasks = [asyncio.create_task(one.ask(40.0, wait=30.0)) for _ in range(4)]
    await asyncio.sleep(0)
    for number in (1, 2):
        one.clock.advance(5.0)
        await one.tell("v", 6, 40.0)
        await one.tell("v", 7, 40.0, new=(f"r{number}",))
    with pytest.raises(QueueFullError) as caught:
        await one.ask(40.0)
    assert caught.value.retry_after_seconds == pytest.approx(3 * 5.0)  # two are before it
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_tiers_take_turns_whoever_was_there_first() -> None:
    cluster = Cluster("v", max_waiting=64)
    await cluster.start()
    await cluster.tell("v", 7, 40.0)
    served: list[str] = []

    async def wait(tier: str) -> None:
        await cluster.ask(40.0, tier=tier, wait=30.0)
        served.append(tier)

    tasks = [asyncio.create_task(wait(tier)) for tier in ["bulk"] * 12 + ["gold"] * 4]
    await asyncio.sleep(0)
    for _ in range(4):  # one leaves after the other
        await cluster.tell("v", 6, 40.0)
        await cluster.tell("v", 7, 40.0, new=tuple(f"r{number}" for number in range(20)))
    assert served == ["bulk", "gold", "bulk", "gold"]
    await cluster.tell("v", 3, 40.0)  # several at once
    assert served[4:] == ["bulk", "gold", "bulk", "gold"]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await cluster.close()


async def test_a_wait_in_vain_ends_with_a_hint_and_a_client_that_left_frees_its_place(one: Cluster) -> None:
    await one.tell("v", 7, 40.0)
    with pytest.raises(QueueFullError, match=r"within 0.01 s"):
        await one.ask(40.0, wait=0.01)
    gone = asyncio.create_task(one.ask(40.0, wait=30.0))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    assert one.metric("waiting_requests", tier="default") == 0


async def test_waiting_ends_when_nobody_serves_the_model_any_more(one: Cluster) -> None:
    await one.tell("v", 7, 40.0)
    waiting = asyncio.create_task(one.ask(40.0, wait=30.0))
    await asyncio.sleep(0)
    await one.scheduler.deregister("v")
    with pytest.raises(UnavailableError, match="no verifier serves"):
        await asyncio.wait_for(waiting, 15)
    assert one.metric("assigns_total", tier="default", result="unavailable") == 1


async def test_a_client_that_leaves_as_its_turn_comes_is_passed_over(one: Cluster) -> None:
    await one.tell("v", 7, 40.0)
    gone, waiting = (asyncio.create_task(one.ask(40.0, wait=30.0)) for _ in range(2))
    await asyncio.sleep(0)
    gone.cancel()
    await one.scheduler.deregister("v")
    with pytest.raises(UnavailableError, match="no verifier serves"):
        await asyncio.wait_for(waiting, 15)


async def test_a_verifier_where_floors_hold_is_taken_before_a_faster_one_where_they_break(
    two: Cluster,
) -> None:
    await two.tell("a", 7, 40.0)
    await two.tell("b", running=20)
    assert await two.ask() == "b"
    with pytest.raises(QueueFullError):
        await two.ask(40.0)  # b is too slow for it, a would break its floor


async def test_a_floor_no_verifier_gives_to_anybody_is_refused(one: Cluster) -> None:
    with pytest.raises(InvalidRequestError, match="got 500: a single request gets about 100 here") as caught:
        await one.ask(500.0, wait=30.0)
    assert caught.value.field == "min_tokens_per_second"
    assert await one.ask(120.0) == "v"  # a lucky draft may hold it: an idle verifier tries
    with pytest.raises(QueueFullError):
        await one.ask(120.0)


async def test_a_verifier_of_unknown_speed_makes_no_floor_impossible(one: Cluster) -> None:
    await one.scheduler.register(Replica(replica_id="new", role=Role.VERIFIER, address="new:1", model="m"))
    assert await one.ask(500.0) == "new"


async def test_a_wish_keeps_nobody_out_and_is_let_in_wherever_no_promise_breaks(one: Cluster) -> None:
    for _ in range(20):
        await one.ask(90.0, promised=False)  # near a lone request's speed
    await one.scheduler.examine_floors()
    assert one.metric("floor_concurrency") == 0
    await one.tell("v", 7, 40.0)
    with pytest.raises(QueueFullError, match="without breaking a speed floor"):
        await one.ask(90.0, promised=False)
    with pytest.raises(InvalidRequestError, match="got 500: a single request gets about 100 here"):
        await one.ask(500.0, promised=False)


async def test_a_slowdown_makes_no_floor_impossible(one: Cluster) -> None:
    """Whoever is kept out for ever cannot see that it is over."""
    await one.tell("v", running=1)
    await one.work("v", rounds=range(1, 100), seconds=0.040)
    with pytest.raises(QueueFullError):
        await one.ask(60.0)  # about 25 tokens/s are left
    with pytest.raises(InvalidRequestError, match="about 100 here"):
        await one.ask(500.0)
    await one.tell("v")
    assert await one.ask(60.0) == "v"


async def test_a_slowdown_that_is_probably_over_gives_no_promise_up(one: Cluster) -> None:
    await one.work("v", rounds=range(1, 100), seconds=0.040)
    for _ in range(30):
        one.clock.advance(1.0)
        await one.tell("v")
    assert await one.ask(60.0) == "v"
    with pytest.raises(QueueFullError):
        await one.ask()  # until its rounds tell


async def test_a_floor_out_of_reach_keeps_nobody_out(one: Cluster) -> None:
    """An idle verifier tries it; others wait neither for its end nor behind one that wants to try, too."""
    assert await one.ask(120.0) == "v"
    await one.tell("v", 1, 120.0)
    lucky = asyncio.create_task(one.ask(120.0, wait=30.0))
    await asyncio.sleep(0)
    assert await one.ask() == "v"
    assert await one.ask(40.0) == "v"  # and its own floor is kept
    await one.tell("v", 7, 40.0)
    held_up = asyncio.create_task(one.ask(wait=30.0))
    await asyncio.sleep(0)
    assert not held_up.done()
    await one.tell("v", 1, 40.0)
    assert await asyncio.wait_for(held_up, 15) == "v"  # though it came later
    assert not lucky.done()
    lucky.cancel()
    await asyncio.gather(lucky, return_exceptions=True)


async def test_a_floor_that_comes_out_of_reach_while_it_waits_keeps_nobody_out(one: Cluster) -> None:
    await one.tell("v", 7, 40.0)
    waiting = asyncio.create_task(one.ask(80.0, wait=30.0))
    await asyncio.sleep(0)
    await one.work("v", rounds=range(1, 100), seconds=0.040)
    assert await one.ask() == "v"
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_a_floor_out_of_reach_hides_no_other(one: Cluster) -> None:
    await one.tell("v", 4, 120.0, 40.0)
    for _ in range(3):
        await one.ask()
    with pytest.raises(QueueFullError):
        await one.ask()
