"""How busy this verifier is, for the scheduler: load levels and which requests have arrived.

Arrived requests are included in the running and waiting ones, so the scheduler stops counting them itself.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dspark_core.engine.rounds.verifier import VerifierStatus
from dspark_core.records import GenerateRequest, VerifierLoad

MAX_NEW_REQUESTS = 256
"""Arrivals reported at once; the scheduler counts any beyond as not yet arrived for a little longer."""
MAX_FLOORS = 64
"""Distinct promised speed floors reported, the highest."""


class LoadMeter:
    """For use on the event loop only."""

    def __init__(self, max_running: int, *, draining: Callable[[], bool] = lambda: False) -> None:
        self._max_running = max_running
        self._draining = draining
        self._status: Callable[[], VerifierStatus] | None = None
        self._arrived: deque[str] = deque(maxlen=MAX_NEW_REQUESTS)
        self._floors: Counter[float] = Counter()

    def watch(self, status: Callable[[], VerifierStatus]) -> None:
        self._status = status

    @contextmanager
    def serving(self, request: GenerateRequest) -> Iterator[None]:
        """Entered for as long as the request is being served."""
        self._arrived.append(request.request_id)
        floor = (request.min_tokens_per_second or 0.0) if request.floor_promised else 0.0
        self._floors[floor] += 1
        try:
            yield
        finally:
            self._floors[floor] -= 1
            if not self._floors[floor]:
                del self._floors[floor]

    def take(self) -> VerifierLoad | None:
        """The current load; each arrival is reported once. None before `watch`."""
        if self._status is None:
            return None
        status = self._status()
        arrived = tuple(self._arrived)
        self._arrived.clear()
        return VerifierLoad(
            running_requests=status.running_requests,
            waiting_requests=status.waiting_requests,
            free_kv_fraction=status.free_kv_fraction,
            max_running_requests=self._max_running,
            draining=self._draining() or not status.healthy,
            new_request_ids=arrived,
            speed_floors=tuple(sorted(filter(None, self._floors), reverse=True)[:MAX_FLOORS]),
        )
