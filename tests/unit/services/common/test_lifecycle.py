"""Tasks end when they are told to, also those whose first cancellation got lost."""

import asyncio

import pytest

from services.common import lifecycle
from services.common.lifecycle import end


async def test_a_loop_that_takes_its_cancellation_for_an_error_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "CANCEL_AGAIN_SECONDS", 0.01)
    lost = 0

    async def call() -> None:
        """As gRPC's do when the cancellation comes just as they fail."""
        nonlocal lost
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if lost == 3:
                raise
            lost += 1
            raise ConnectionError from None

    async def retry() -> None:
        while True:
            try:
                await call()
            except ConnectionError:
                continue

    task = asyncio.create_task(retry())
    await asyncio.sleep(0)
    async with asyncio.timeout(15):
        await end(task)
    assert task.cancelled()
    assert lost == 3


async def test_what_a_task_raises_while_it_ends_is_its_own_business() -> None:
    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise ValueError("while closing")

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    await end(task)
    assert isinstance(task.exception(), ValueError)


async def test_a_task_that_has_ended_is_left_alone() -> None:
    task = asyncio.create_task(asyncio.sleep(0, "done"))
    assert await task == "done"
    await end(task)
    assert task.result() == "done"
