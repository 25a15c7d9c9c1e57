"""Tells a verifier that is busy from one that hangs: a stream's silence alone does not.

A process that is stopped, or a machine that is gone without a word, keeps its connections open.
gRPC's own pings notice within a minute; users should not wait that long.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from dspark_core.errors import DSparkError, UnavailableError
from services.common.lifecycle import end

_T = TypeVar("_T")

SILENCE_SECONDS = 5.0
"""Without a chunk for so long, the verifier is asked whether it lives."""
ANSWER_SECONDS = 5.0
"""How long it may take to say so; many times a round, for it may share few cores."""


async def while_answering(
    chunks: AsyncIterator[_T],
    alive: Callable[[], Awaitable[bool]],
    *,
    silence_seconds: float = SILENCE_SECONDS,
) -> AsyncIterator[_T]:
    """The same chunks. Raises UnavailableError when none comes and `alive` says no."""
    watch = _Watch(alive, silence_seconds)
    task = asyncio.create_task(watch.run(), name="verifier-silence")
    try:
        while True:
            try:
                chunk = await watch.next(chunks)
            except StopAsyncIteration:
                return
            yield chunk
    finally:
        await end(task)


async def answers(question: Callable[[], Awaitable[object]], seconds: float) -> bool:
    """Whether a call to a service succeeds in time."""
    try:
        async with asyncio.timeout(seconds):
            await question()
    except (TimeoutError, DSparkError):
        return False
    return True


class _Watch:
    """One task for a whole stream: one for every chunk would cost more than the chunk."""

    def __init__(self, alive: Callable[[], Awaitable[bool]], silence_seconds: float) -> None:
        self._alive = alive
        self._silence_seconds = silence_seconds
        self._clock = asyncio.get_running_loop().time
        self._waiting: asyncio.Timeout | None = None
        self._since = self._clock()

    async def next(self, chunks: AsyncIterator[_T]) -> _T:
        try:
            async with asyncio.timeout(None) as limit:
                self._waiting, self._since = limit, self._clock()
                return await anext(chunks)
        except TimeoutError:
            if not limit.expired():
                raise
            raise UnavailableError("the verifier hangs: it sends nothing and does not answer") from None
        finally:
            self._waiting = None

    async def run(self) -> None:
        while True:
            asked_about = self._waiting
            silent = self._clock() - self._since
            if asked_about is None or silent < self._silence_seconds:
                await asyncio.sleep(max(self._silence_seconds - silent, self._silence_seconds / 4))
            elif await self._alive():
                await asyncio.sleep(self._silence_seconds)
            elif self._waiting is asked_about:  # and no chunk came while it was asked
                asked_about.reschedule(self._clock())
                return
