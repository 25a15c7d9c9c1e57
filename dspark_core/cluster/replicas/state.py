"""Which replicas the scheduler knows.

Pure values and an injected clock. There are two sources: replicas that renew their lease here, and a view
of those that other schedulers hold in the shared registry. Own leases win because they are fresher. Only
registering starts a lease; reports also extend it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from dspark_core.records import Replica, Role


@dataclass(frozen=True, slots=True)
class Lease:
    replica: Replica
    expires_at: float
    stored_at: float
    """When it was last written to the registry."""
    kept_by_reports: bool = True


class ClusterState:
    def __init__(self, lease_seconds: float, clock: Callable[[], float]) -> None:
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._leases: dict[str, Lease] = {}
        self._shared: dict[str, Replica] = {}
        self._known: dict[str, Replica] = {}
        """Both together, by id in order unless `_unordered`."""
        self._unordered = False
        self._none_expires_before = -math.inf
        """No lease runs out sooner: leases are only extended."""
        self._changes = 0

    @property
    def changes(self) -> int:
        """Grows whenever replicas may have come, gone, or changed role, model or weights."""
        self._drop_expired()
        return self._changes

    def register(self, replica: Replica) -> None:
        now = self._clock()
        lease = Lease(replica, now + self._lease_seconds, now)
        self._leases[replica.replica_id] = lease
        self._none_expires_before = min(self._none_expires_before, lease.expires_at)
        before = self._known.get(replica.replica_id)
        self._known[replica.replica_id] = replica
        self._unordered = self._unordered or before is None
        if before is None or _nature(before) != _nature(replica):
            self._changes += 1

    def extend_lease(self, replica_id: str) -> None:
        """Extends the lease of a registered replica that sent a report. One that left or expired has to
        register again."""
        lease = self._running(replica_id)
        if lease is not None and lease.kept_by_reports:
            self._leases[replica_id] = replace(lease, expires_at=self._clock() + self._lease_seconds)

    def record_replacement(self, replica_id: str) -> None:
        """Notes that the id now belongs to another replica, as a report showed. The lease may be the previous
        replica's, so reports no longer extend it until the id registers again."""
        if (lease := self._running(replica_id)) is not None:
            self._leases[replica_id] = replace(lease, kept_by_reports=False)

    def due_for_registry(self, replica_id: str) -> Replica | None:
        """The replica if half its lease has passed since it was written to the registry: only reports keep
        it alive. The caller must then write it. None if not due."""
        lease, now = self._running(replica_id), self._clock()
        if lease is None or not lease.kept_by_reports or now - lease.stored_at < self._lease_seconds / 2:
            return None
        self._leases[replica_id] = replace(lease, stored_at=now)
        return lease.replica

    def is_registered(self, replica_id: str) -> bool:
        """Whether it has a running lease here."""
        return self._running(replica_id) is not None

    def deregister(self, replica_id: str) -> None:
        """Unknown ids are ignored."""
        self._leases.pop(replica_id, None)
        self._shared.pop(replica_id, None)
        if self._known.pop(replica_id, None) is not None:
            self._changes += 1

    def replace_shared(self, replicas: Iterable[Replica]) -> None:
        """Sets what the registry lists. The view stays while the registry cannot be read."""
        self._shared = {replica.replica_id: replica for replica in replicas}
        self._known = self._shared | {name: lease.replica for name, lease in self._leases.items()}
        self._unordered = True
        self._changes += 1

    def leases(self) -> tuple[tuple[Replica, float], ...]:
        """Replicas registered here with the seconds left of their leases; drops expired ones."""
        now = self._drop_expired()
        return tuple((lease.replica, lease.expires_at - now) for lease in self._leases.values())

    def replicas(self, role: Role | None = None) -> tuple[Replica, ...]:
        """All known replicas, or those of one role, ordered by id."""
        self._drop_expired()
        if self._unordered:
            self._known = dict(sorted(self._known.items()))
            self._unordered = False
        known = self._known.values()
        return tuple(known if role is None else [replica for replica in known if replica.role is role])

    def _drop_expired(self) -> float:
        """Returns the time as of which it did."""
        now = self._clock()
        if now >= self._none_expires_before:
            for replica_id in [key for key, lease in self._leases.items() if lease.expires_at <= now]:
                # The shared view may still show it; if another scheduler holds it, the next view will.
                self.deregister(replica_id)
            self._none_expires_before = min(
                (lease.expires_at for lease in self._leases.values()), default=math.inf
            )
        return now

    def _running(self, replica_id: str) -> Lease | None:
        lease = self._leases.get(replica_id)
        return lease if lease is not None and lease.expires_at > self._clock() else None


def _nature(replica: Replica) -> tuple[Role, str, str]:
    return replica.role, replica.model, replica.weights
