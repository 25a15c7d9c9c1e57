"""Which replicas the scheduler knows, and which verifier takes the next request.

Pure values and an injected clock. Two sources: replicas that renew their lease here, and a view of
those that other schedulers sharing the registry hold. Own leases win, they are the fresher word.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from dspark_core.errors import UnavailableError
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
        # Replicas tell their load only when they renew; what was assigned since counts on top, or
        # every request in between would go to the same verifier.
        self._assigned: Counter[str] = Counter()

    def register(self, replica: Replica) -> None:
        self._leases[replica.replica_id] = Lease(replica, self._clock() + self._lease_seconds)
        del self._assigned[replica.replica_id]

    def deregister(self, replica_id: str) -> None:
        """Unknown ids are ignored."""
        self._leases.pop(replica_id, None)
        self._shared.pop(replica_id, None)
        del self._assigned[replica_id]

    def replace_shared(self, replicas: Iterable[Replica]) -> None:
        """What the registry lists now. Kept as it is while the registry cannot be read."""
        shared = {replica.replica_id: replica for replica in replicas}
        for replica_id, replica in shared.items():
            if self._shared.get(replica_id) != replica and replica_id not in self._leases:
                del self._assigned[replica_id]
        self._shared = shared
        for replica_id in self._assigned.keys() - shared.keys() - self._leases.keys():
            del self._assigned[replica_id]

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

    def assign(self, model: str, exclude: Collection[str] = ()) -> Replica:
        """The verifier of a model with the least load, then the most free KV, then the first id.

        UnavailableError says which of the reasons it is: no such model, all excluded, all draining.
        """
        verifiers = self.replicas(Role.VERIFIER)
        serving = [replica for replica in verifiers if replica.model == model]
        if not serving:
            models = ", ".join(sorted({replica.model for replica in verifiers})) or "none"
            raise UnavailableError(f"no verifier serves model {model!r} now (models served: {models})")
        candidates = [r for r in serving if not r.draining and r.replica_id not in exclude]
        if not candidates:
            draining = sum(replica.draining for replica in serving)
            raise UnavailableError(
                f"no verifier of model {model!r} can take a request: of {len(serving)}, {draining} are "
                f"draining and {sum(r.replica_id in exclude for r in serving)} are excluded by the request"
            )
        chosen = min(candidates, key=self._preference)
        self._assigned[chosen.replica_id] += 1
        return chosen

    def _preference(self, replica: Replica) -> tuple[int, float, str]:
        assigned = self._assigned[replica.replica_id]
        load = replica.running_requests + replica.waiting_requests + assigned
        return load, -replica.free_kv_fraction, replica.replica_id
