"""The running event loop's time, moved on by hand: a long time limit passes without a wait, and a machine
that holds the test up for a moment comes nowhere near it."""

from __future__ import annotations

import asyncio


class LoopClock:
    """Adds to the time of the loop it is made in, for as long as that loop lives."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._time = self._loop.time
        self._skipped_seconds = 0.0
        self._loop.time = lambda: self._time() + self._skipped_seconds  # type: ignore[method-assign]

    async def advance(self, seconds: float) -> None:
        """What falls due meanwhile has run afterwards."""
        self._skipped_seconds += seconds
        due = asyncio.get_running_loop().create_future()
        self._loop.call_at(self._loop.time(), due.set_result, None)
        await due
        await asyncio.sleep(0)
