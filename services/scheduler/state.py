"""Which replicas the scheduler knows.

Pure values and an injected clock. Two sources: replicas that renew their lease here, and a view of
those that other schedulers sharing the registry hold. Own leases win, they are the fresher word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dspark_core.records import Replica, Role


@dataclass(frozen=True, slots=True)
class Lease:
    replica: Replica
    expires_at: float


class ClusterState:
    def __init__(self, lease_seconds: float, clock: Callable[[], float]) -> None:
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._leases: dict[str, Lease] = {}
        self._shared: dict[str, Replica] = {}

    def register(self, replica: Replica) -> None:
        self._leases[replica.replica_id] = Lease(replica, self._clock() + self._lease_seconds)

    def deregister(self, replica_id: str) -> None:
        """Unknown ids are ignored."""
        self._leases.pop(replica_id, None)
        self._shared.pop(replica_id, None)

    def replace_shared(self, replicas: Iterable[Replica]) -> None:
        """What the registry lists now. Kept as it is while the registry cannot be read."""
        self._shared = {replica.replica_id: replica for replica in replicas}

    def leases(self) -> tuple[tuple[Replica, float], ...]:
        """Replicas that registered here, with the seconds left of their leases; drops expired ones."""
        now = self._clock()
        for replica_id in [key for key, lease in self._leases.items() if lease.expires_at <= now]:
            # The shared view may still show it; if another scheduler holds it, the next view will.
            self.deregister(replica_id)
        return tuple((lease.replica, lease.expires_at - now) for lease in self._leases.values())

    def replicas(self, role: Role | None = None) -> tuple[Replica, ...]:
        """Every known replica of a role, or of all, by id."""
        known = self._shared | {replica.replica_id: replica for replica, _ in self.leases()}
        return tuple(
            known[replica_id]
            for replica_id in sorted(known)
            if role is None or known[replica_id].role is role
        )
