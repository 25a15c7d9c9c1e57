"""The verifiers as last heard of from the scheduler, to route by while it cannot be asked."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable

from dspark_core.records import Replica

REMEMBERED_CHOICES = 32
"""Of the scheduler's: how it spread the newest requests says which verifiers are fast just now."""
MAX_RATIO = 8.0
"""A verifier it avoided is given at least this fraction of what its favourite gets."""
FORGET_SECONDS = 30.0
"""With this time constant its spread fades into an even one: what it knew grows old."""


class ReplicaView:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._choices: deque[str] = deque(maxlen=REMEMBERED_CHOICES)
        self._chosen_at = -math.inf
        self._replicas: dict[str, Replica] = {}
        self._in_flight: Counter[str] = Counter()
        self._suspects: set[str] = set()

    def update(self, replicas: Iterable[Replica]) -> None:
        """Replaces the view."""
        self._replicas = {replica.replica_id: replica for replica in replicas}
        self._suspects.clear()

    def add(self, replica: Replica) -> None:
        self._replicas[replica.replica_id] = replica

    def chosen(self, replica: Replica) -> None:
        """By the scheduler, for a request."""
        self.add(replica)
        self._choices.append(replica.replica_id)
        self._chosen_at = self._clock()

    def suspect(self, replica_id: str) -> None:
        """It has just failed: chosen only when no other is left, for it may have come back."""
        self._suspects.add(replica_id)

    def trust(self, replica_id: str) -> None:
        """It has just answered."""
        self._suspects.discard(replica_id)

    def addresses(self) -> frozenset[str]:
        return frozenset(replica.address for replica in self._replicas.values())

    def started(self, replica_id: str) -> None:
        self._in_flight[replica_id] += 1

    def ended(self, replica_id: str) -> None:
        self._in_flight[replica_id] -= 1
        if not self._in_flight[replica_id]:
            del self._in_flight[replica_id]

    def choose(self, exclude: Collection[str]) -> Replica | None:
        """The one with the fewest requests for its speed, this gateway's own counted as they are now."""
        usable = [
            replica
            for replica in self._replicas.values()
            if not replica.draining and replica.replica_id not in exclude
        ]
        weights = self._weights([replica.replica_id for replica in usable])

        def load(replica: Replica) -> tuple[bool, float, int, str]:
            # The scheduler's numbers are as old as the view; our own requests are the fresher sign.
            reported = replica.running_requests + replica.waiting_requests
            name = replica.replica_id
            return name in self._suspects, (self._in_flight[name] + 1) / weights[name], reported, name

        return min(usable, key=load, default=None)

    def _weights(self, names: Collection[str]) -> dict[str, float]:
        """As the scheduler spread its newest requests, the less so the longer ago that was."""
        counts = Counter(self._choices)
        most = max((counts[name] for name in names), default=0)
        if not most:
            return dict.fromkeys(names, 1.0)
        freshness = math.exp(-(self._clock() - self._chosen_at) / FORGET_SECONDS)
        return {name: max(counts[name] / most, 1.0 / MAX_RATIO) ** freshness for name in names}
