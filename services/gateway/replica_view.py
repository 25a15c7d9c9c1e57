"""The verifiers as last heard of from the scheduler, to route by while it cannot be asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from dspark_core.records import Replica


class ReplicaView:
    def __init__(self) -> None:
        self._replicas: dict[str, Replica] = {}
        self._in_flight: Counter[str] = Counter()
        self._suspects: set[str] = set()

    def update(self, replicas: Iterable[Replica]) -> None:
        """Replaces the view."""
        self._replicas = {replica.replica_id: replica for replica in replicas}
        self._suspects.clear()

    def add(self, replica: Replica) -> None:
        self._replicas[replica.replica_id] = replica

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
        """The one with the fewest requests, this gateway's own counted as they are now."""
        usable = (
            replica
            for replica in self._replicas.values()
            if not replica.draining and replica.replica_id not in exclude
        )
        return min(usable, key=self._load, default=None)

    def _load(self, replica: Replica) -> tuple[bool, int, int, str]:
        # The scheduler's numbers are as old as the view; our own requests are the fresher sign.
        reported = replica.running_requests + replica.waiting_requests
        name = replica.replica_id
        return name in self._suspects, self._in_flight[name], reported, name
