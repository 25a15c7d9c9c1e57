"""Waits that somebody else may end."""

import asyncio

import pytest

from services.common.interruption import Interruption
from tests.support.loop_clock import LoopClock


class StuckError(Exception):
    pass


async def forever() -> None:
    await asyncio.Event().wait()


async def test_a_wait_gives_what_it_waited_for() -> None:
    with Interruption() as limit:
        assert await limit.wait(asyncio.sleep(0, "done")) == "done"
        assert limit.waiting_since is None


async def test_an_interruption_ends_the_waits_that_go_on_and_those_to_come() -> None:
    with Interruption() as limit:
        waits = [asyncio.create_task(limit.wait(forever())) for _ in range(2)]
        await asyncio.sleep(0)
        assert limit.waiting_since is not None
        limit.interrupt(StuckError())
        limit.interrupt(ValueError("too late"))
        for wait in waits:
            with pytest.raises(StuckError):
                await wait
            assert wait.cancelling() == 0
        with pytest.raises(StuckError):
            await limit.wait(forever())  # and the coroutine is closed, not left behind


async def test_a_task_that_is_cancelled_by_others_stays_cancelled() -> None:
    with Interruption() as limit:
        wait = asyncio.create_task(limit.wait(forever()))
        await asyncio.sleep(0)
        wait.cancel()
        limit.interrupt(StuckError())
        with pytest.raises(asyncio.CancelledError):
            await wait


async def test_of_two_around_one_wait_the_one_that_was_told_raises() -> None:
    with Interruption() as outer, Interruption() as inner:
        wait = asyncio.create_task(outer.wait(inner.wait(forever())))
        await asyncio.sleep(0)
        outer.interrupt(StuckError())
        with pytest.raises(StuckError):
            await wait


async def test_the_time_of_a_whole_stream_is_limited() -> None:
    clock = LoopClock()
    with Interruption() as limit:
        limit.after(100, StuckError())
        for _ in range(9):
            await limit.wait(clock.advance(10))
        with pytest.raises(StuckError):
            await limit.wait(clock.advance(10))


async def test_the_time_of_each_wait_is_limited() -> None:
    clock = LoopClock()
    with Interruption() as limit:
        limit.limit_each(100, StuckError())
        for _ in range(15):  # together longer than the limit
            await limit.wait(clock.advance(20))
        waiting = asyncio.create_task(limit.wait(forever()))
        await asyncio.sleep(0)
        for _ in range(3):
            await clock.advance(25)  # looked at that often
            assert not waiting.done()
        await clock.advance(50)
        with pytest.raises(StuckError):
            await waiting


async def test_timers_end_with_it() -> None:
    clock = LoopClock()
    with Interruption() as limit:
        limit.after(10, StuckError())
        limit.limit_each(10, StuckError())
    await clock.advance(50)
    await limit.wait(asyncio.sleep(0))  # nobody interrupted it
