"""Waits for conditions with a deadline, so that no test sleeps for a guessed time."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable


async def eventually(condition: Callable[[], bool], within_seconds: float = 15.0) -> None:
    deadline = time.monotonic() + within_seconds
    while not condition():
        assert time.monotonic() < deadline, f"not true within {within_seconds} s"
        await asyncio.sleep(0.005)


async def exhaust(stream: AsyncIterator[object], within_seconds: float = 15.0) -> None:
    async with asyncio.timeout(within_seconds):
        async for _ in stream:
            pass
