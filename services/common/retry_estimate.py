"""When to come back to a full queue, by how fast it moved lately."""

from __future__ import annotations

from collections.abc import Callable

MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 1.0, 60.0
_SMOOTHING = 0.2


class RetryEstimate:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._interval: float | None = None
        self._moved_at: float | None = None

    def moved(self) -> None:
        """To be called whenever one more gets its turn."""
        now = self._clock()
        if self._moved_at is not None:
            passed = min(now - self._moved_at, MAX_RETRY_SECONDS)  # nobody came for longer: that says nothing
            known = passed if self._interval is None else self._interval
            self._interval = known + _SMOOTHING * (passed - known)
        self._moved_at = now

    def seconds(self, turns: int) -> float:
        """After how long as many have had their turn."""
        return min(max(turns * (self._interval or 0.0), MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)
