"""The last list of verifiers from the scheduler, for routing while it does not answer."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable

from dspark_core.records import Replica

REMEMBERED_CHOICES = 32
"""Scheduler assignments to remember: how it spread recent requests shows which verifiers are fast now."""
MAX_RATIO = 8.0
"""A verifier the scheduler avoided still gets at least 1/MAX_RATIO of the share of its favourite."""
FORGET_SECONDS = 30.0
"""Time constant with which that spread decays to an even one, as the scheduler's knowledge ages."""


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
        """The scheduler assigned a request to this replica."""
        self.add(replica)
        self._choices.append(replica.replica_id)
        self._chosen_at = self._clock()

    def suspect(self, replica_id: str) -> None:
        """The replica has just failed: choose it only if no other is left, as it may be back."""
        self._suspects.add(replica_id)

    def trust(self, replica_id: str) -> None:
        """The replica has just answered."""
        self._suspects.discard(replica_id)

    def addresses(self) -> frozenset[str]:
        return frozenset(replica.address for replica in self._replicas.values())

    def started(self, replica_id: str) -> None:
        self._in_flight[replica_id] += 1

    def ended(self, replica_id: str) -> None:
        self._in_flight[replica_id] -= 1
        if not self._in_flight[replica_id]:
            del self._in_flight[replica_id]

    def choose(self, exclude: Collection[str], model_weights: str = "") -> Replica | None:
        """The replica with the fewest of this gateway's requests in flight relative to its weight; with
        `model_weights`, only among those that serve them."""
        usable = [
            replica
            for replica in self._replicas.values()
            if not replica.draining
            and replica.replica_id not in exclude
            and model_weights in ("", replica.weights)
        ]
        weights = self._weights([replica.replica_id for replica in usable])

        def load(replica: Replica) -> tuple[bool, float, int, str]:
            # The scheduler's numbers are as old as the view; our own requests in flight are current.
            reported = replica.running_requests + replica.waiting_requests
            name = replica.replica_id
            return name in self._suspects, (self._in_flight[name] + 1) / weights[name], reported, name

        return min(usable, key=load, default=None)

    def _weights(self, names: Collection[str]) -> dict[str, float]:
        """Weights from the scheduler's recent assignments, decaying to equal ones as these age."""
        counts = Counter(self._choices)
        most = max((counts[name] for name in names), default=0)
        if not most:
            return dict.fromkeys(names, 1.0)
        freshness = math.exp(-(self._clock() - self._chosen_at) / FORGET_SECONDS)
        return {name: max(counts[name] / most, 1.0 / MAX_RATIO) ** freshness for name in names}
