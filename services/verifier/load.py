"""How busy this verifier is, for the scheduler: levels, and which requests have arrived.

A request that is told as arrived is one of those that run or wait: the scheduler counts it no more itself.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dspark_core.engine.verifier import VerifierStatus
from dspark_core.records import GenerateRequest, VerifierLoad

MAX_NEW_REQUESTS = 256
"""More arrivals between two reports are left out; they count as on their way for a little longer."""
MAX_FLOORS = 64
"""Requests may each ask for another; the highest are told."""


class LoadMeter:
    """Arrivals are told from the event loop, loads are taken there too."""

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
        """Around a request's whole stay."""
        self._arrived.append(request.request_id)
        floor = request.min_tokens_per_second or 0.0
        self._floors[floor] += 1
        try:
            yield
        finally:
            self._floors[floor] -= 1
            if not self._floors[floor]:
                del self._floors[floor]

    def take(self) -> VerifierLoad | None:
        """The load now; arrivals are told once. None before there is a verifier to watch."""
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
