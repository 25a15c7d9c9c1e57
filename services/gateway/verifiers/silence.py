"""Tells a busy verifier from one that hangs, which a stream's silence alone cannot.

Connections to a stopped process, or to a machine that vanished, look open. gRPC's own pings notice within
a minute; users should not wait that long.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from dspark_core.errors import DSparkError, UnavailableError
from services.common.interruption import Interruption
from services.common.lifecycle import end

_T = TypeVar("_T")

SILENCE_SECONDS = 5.0
"""After this long without a chunk, the verifier is probed."""
ANSWER_SECONDS = 5.0
"""Time limit for its response: many times a round, because it may share few cores."""


async def while_answering(
    chunks: AsyncIterator[_T],
    alive: Callable[[], Awaitable[bool]],
    *,
    silence_seconds: float = SILENCE_SECONDS,
) -> AsyncIterator[_T]:
    """Passes the chunks on. Raises UnavailableError if none arrives and `alive` returns False."""
    with Interruption() as waits:
        task = asyncio.create_task(_watch(waits, alive, silence_seconds), name="verifier-silence")
        try:
            while True:
                try:
                    chunk = await waits.wait(anext(chunks))
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


async def _watch(waits: Interruption, alive: Callable[[], Awaitable[bool]], silence_seconds: float) -> None:
    """Interrupts a wait longer than `silence_seconds` once `alive` has returned False."""
    clock = asyncio.get_running_loop().time
    while True:
        since = waits.waiting_since
        silent = 0.0 if since is None else clock() - since
        if silent < silence_seconds:
            await asyncio.sleep(max(silence_seconds - silent, silence_seconds / 4))
        elif await alive():
            await asyncio.sleep(silence_seconds)
        elif waits.waiting_since == since:  # no chunk came during the probe
            waits.interrupt(UnavailableError("the verifier hangs: it sends nothing and does not answer"))
            return
