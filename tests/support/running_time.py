"""How long something takes on a machine that at times stops for seconds, as virtual ones do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.common.lifecycle import end

TICK_SECONDS = 0.02
MOST_SECONDS = 0.2


class RunningTime:
    """Counts seconds, but of a longer pause between two ticks only so many: then the machine stood still."""

    seconds = 0.0

    @classmethod
    @asynccontextmanager
    async def counted(cls) -> AsyncIterator[RunningTime]:
        watch = cls()
        ticking = asyncio.create_task(watch._tick())
        try:
            yield watch
        finally:
            await end(ticking)

    async def _tick(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            self.seconds += min(now - last, MOST_SECONDS)
            last = now
