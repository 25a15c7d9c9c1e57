"""How many requests each verifier has: its last reported load plus what was assigned to it since.

Pure values and an injected clock.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from dspark_core.records import Replica, VerifierLoad

PENDING_SECONDS = 2.0
"""How long a request counts that was assigned but never arrived, for example because its client left."""
MAX_ENTRIES = 4096
"""Above this number, entries of replicas that are gone are dropped."""
SILENCE_SECONDS = 1.0
SILENT_ROUNDS = 4.0
"""A verifier with running requests hangs if it completes no round for both SILENCE_SECONDS and SILENT_ROUNDS
times the longest expected round."""


@dataclass(slots=True)
class _Entry:
    load: VerifierLoad | None = None
    busy_since: float = 0.0
    """Start of the current period in which it reports running requests."""
    last_round_at: float | None = None
    """When it last reported a round."""
    lost: bool = False
    pending: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Assigned requests that have not arrived yet: id -> (time of assignment, promised speed floor)."""


class LoadBook:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._entries: defaultdict[str, _Entry] = defaultdict(_Entry)

    def registered(self, replica: Replica) -> None:
        """Takes a registration or renewal as a sign of life. It is the only source of load figures for a
        replica that sends no reports."""
        if len(self._entries) >= MAX_ENTRIES:
            self._drop_without_load()
        entry = self._entries[replica.replica_id]
        entry.lost = False
        if entry.load is None:
            entry.pending.clear()

    def update(self, replica_id: str, load: VerifierLoad) -> None:
        entry = self._entries[replica_id]
        if entry.load is None or not entry.load.running_requests:
            entry.busy_since = self._clock()
        entry.load, entry.lost = load, False
        for request_id in load.new_request_ids:
            entry.pending.pop(request_id, None)

    def record_round(self, replica_id: str) -> None:
        """Notes that it reported a round."""
        self._entries[replica_id].last_round_at = self._clock()

    def idle_seconds(self, replica_id: str) -> float:
        """Time since its last reported round, 0 if it never reported one."""
        entry = self._entries.get(replica_id)
        if entry is None or entry.last_round_at is None:
            return 0.0
        return max(0.0, self._clock() - entry.last_round_at)

    def assigned(self, replica_id: str, request_id: str, floor: float = 0.0) -> None:
        self._entries[replica_id].pending[request_id] = (self._clock(), floor)

    def disconnected(self, replica_id: str) -> None:
        """Marks a verifier whose stream broke as lost until it is heard from again."""
        entry = self._entries[replica_id]
        entry.load, entry.lost = None, True

    def _drop_without_load(self) -> None:
        """Drops entries without a load, as replicas that vanished leave behind; live ones are re-created."""
        for replica_id in [key for key, entry in self._entries.items() if entry.load is None]:
            del self._entries[replica_id]

    def forget(self, replica_id: str) -> None:
        self._entries.pop(replica_id, None)

    def is_lost(self, replica_id: str) -> bool:
        return replica_id in self._entries and self._entries[replica_id].lost

    def is_draining(self, replica: Replica) -> bool:
        load = self._load(replica.replica_id)
        return replica.draining or (load is not None and load.draining)

    def requests(self, replica: Replica) -> int:
        """Running, waiting and assigned but not yet arrived."""
        entry = self._entries.get(replica.replica_id)
        load = entry.load if entry else None
        told = load or replica
        return told.running_requests + told.waiting_requests + self._pending(replica.replica_id)

    def highest_floor(self, replica_id: str, reach: Callable[[], float]) -> float:
        """The highest promised speed floor (tokens per second) of its requests that does not exceed `reach`,
        which is not asked if there are no floors; 0.0 if there is none."""
        entry = self._entries.get(replica_id)
        if entry is None:
            return 0.0
        told = entry.load.speed_floors if entry.load else ()
        floors = (*told, *(floor for _, floor in entry.pending.values()))
        if not any(floors):
            return 0.0
        most = reach()
        return max((floor for floor in floors if floor <= most), default=0.0)

    def free_kv_fraction(self, replica: Replica) -> float:
        return (self._load(replica.replica_id) or replica).free_kv_fraction

    def max_running(self, replica_id: str) -> int:
        """0 if unknown."""
        load = self._load(replica_id)
        return load.max_running_requests if load else 0

    def hangs(self, replica_id: str, longest_round_seconds: Callable[[], float]) -> bool:
        """Whether a verifier with running requests completes no round. Load reports prove nothing: they are
        sent independently of rounds, even while the device hangs. `longest_round_seconds` is asked only of a
        silent one."""
        entry = self._entries.get(replica_id)
        if entry is None or entry.load is None or not entry.load.running_requests:
            return False
        silent = self._clock() - max(entry.busy_since, entry.last_round_at or 0.0)
        return silent > SILENCE_SECONDS and silent > SILENT_ROUNDS * longest_round_seconds()

    def _load(self, replica_id: str) -> VerifierLoad | None:
        entry = self._entries.get(replica_id)
        return entry.load if entry else None

    def _pending(self, replica_id: str) -> int:
        entry = self._entries.get(replica_id)
        if entry is None:
            return 0
        if entry.load is not None:
            oldest = self._clock() - PENDING_SECONDS
            for request_id in [key for key, (at, _) in entry.pending.items() if at <= oldest]:
                del entry.pending[request_id]
        return len(entry.pending)
