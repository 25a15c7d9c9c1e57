import asyncio

import pytest

from dspark_core.errors import DeadlineError, QueueFullError, UnavailableError
from services.gateway.admission import Admission
from tests.support.polling import eventually


async def test_requests_beyond_the_places_wait_in_order_and_beyond_the_queue_are_refused() -> None:
    admission = Admission(max_running=1, max_waiting=2)
    await admission.acquire(1.0)
    order: list[str] = []

    async def take(name: str) -> None:
        await admission.acquire(10.0)
        order.append(name)
        admission.release()

    first = asyncio.create_task(take("first"))
    second = asyncio.create_task(take("second"))
    await eventually(lambda: admission.waiting == 2)
    with pytest.raises(QueueFullError, match="1 requests run and 2 wait, the limits are 1 and 2"):
        await admission.acquire(1.0)
    admission.release()
    await asyncio.gather(first, second)
    assert order == ["first", "second"]
    assert (admission.running, admission.waiting) == (0, 0)


async def test_waiting_ends_with_the_deadline_and_frees_the_place_in_the_queue() -> None:
    admission = Admission(max_running=1, max_waiting=1)
    await admission.acquire(1.0)
    with pytest.raises(DeadlineError, match=r"waited 0\.01 s"):
        await admission.acquire(0.01)
    assert (admission.running, admission.waiting) == (1, 0)


async def test_a_cancelled_wait_frees_its_place() -> None:
    admission = Admission(max_running=1, max_waiting=1)
    await admission.acquire(1.0)
    waiting = asyncio.create_task(admission.acquire(10.0))
    await eventually(lambda: admission.waiting == 1)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert admission.waiting == 0
    admission.release()
    await admission.acquire(1.0)


async def test_draining_refuses_new_requests_and_waits_for_the_others() -> None:
    admission = Admission(max_running=2, max_waiting=0)
    assert await admission.wait_idle(0.0)
    await admission.acquire(1.0)
    admission.drain()
    with pytest.raises(UnavailableError, match="draining"):
        await admission.acquire(1.0)
    assert not await admission.wait_idle(0.01)
    admission.release()
    assert await admission.wait_idle(1.0)
