import asyncio
from contextlib import closing

import pytest

from dspark_core.errors import DeadlineError, QueueFullError, UnavailableError
from services.gateway.admission import Admission, Ticket
from tests.support.clock import ManualClock
from tests.support.polling import eventually


async def running_ticket(admission: Admission) -> Ticket:
    ticket = admission.enter()
    await ticket.start(1.0)
    return ticket


async def test_requests_beyond_the_places_wait_in_order_and_beyond_the_queue_are_refused() -> None:
    admission = Admission(max_running=1, max_waiting=2)
    running = await running_ticket(admission)
    order: list[str] = []

    async def take(name: str) -> None:
        with closing(admission.enter()) as ticket:
            await ticket.start(10.0)
            order.append(name)

    first = asyncio.create_task(take("first"))
    second = asyncio.create_task(take("second"))
    await eventually(lambda: admission.waiting == 2)
    with pytest.raises(QueueFullError, match="3 requests are here, 1 of them run; 1 may run and 2 wait"):
        admission.enter()
    running.close()
    await asyncio.gather(first, second)
    assert order == ["first", "second"]
    assert (admission.running, admission.waiting) == (0, 0)


async def test_who_is_refused_is_told_when_it_will_be_its_turn() -> None:
    clock = ManualClock()
    admission = Admission(max_running=4, max_waiting=100, clock=clock)

    def refused() -> float:
        with pytest.raises(QueueFullError) as caught:
            admission.enter()
        return caught.value.retry_after_seconds

    tickets = [admission.enter() for _ in range(104)]
    assert refused() == 1.0  # how fast it moves is not known yet
    for ticket in tickets[:50]:
        clock.advance(2.0)
        ticket.close()
        admission.enter()
    assert [refused() for _ in range(3)] == pytest.approx([2.0, 4.0, 6.0])
    clock.advance(2.0)
    tickets[50].close()
    admission.enter()
    assert refused() == pytest.approx(6.0)  # two were told to come before
    for _ in range(200):
        refused()
    assert refused() == 60.0


async def test_a_request_that_is_still_prepared_takes_a_place_too() -> None:
    admission = Admission(max_running=1, max_waiting=0)
    ticket = admission.enter()
    with pytest.raises(QueueFullError):
        admission.enter()
    ticket.close()
    ticket.close()
    admission.enter()
    assert (admission.running, admission.waiting) == (0, 1)


async def test_waiting_ends_with_the_deadline() -> None:
    admission = Admission(max_running=1, max_waiting=1)
    await running_ticket(admission)
    with closing(admission.enter()) as ticket, pytest.raises(DeadlineError, match=r"waited 0\.01 s"):
        await ticket.start(0.01)
    assert (admission.running, admission.waiting) == (1, 0)


async def test_a_cancelled_wait_frees_its_place() -> None:
    admission = Admission(max_running=1, max_waiting=1)
    running = await running_ticket(admission)
    ticket = admission.enter()
    waiting = asyncio.create_task(ticket.start(10.0))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    ticket.close()
    assert (admission.running, admission.waiting) == (1, 0)
    running.close()
    await running_ticket(admission)


async def test_draining_refuses_new_requests_and_waits_for_the_others() -> None:
    admission = Admission(max_running=2, max_waiting=0)
    assert await admission.wait_idle(0.0)
    running = await running_ticket(admission)
    admission.drain()
    with pytest.raises(UnavailableError, match="draining"):
        admission.enter()
    assert not await admission.wait_idle(0.01)
    running.close()
    assert await admission.wait_idle(1.0)
