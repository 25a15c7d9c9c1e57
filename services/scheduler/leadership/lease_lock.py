"""The leader lock as a Kubernetes Lease (coordination.k8s.io/v1), for schedulers without Redis.

Every write names the version it is based on, so of two concurrent writers one gets a conflict. How long the
holder has been silent is measured on this process's own clock, since the lease was last seen to change;
clocks of different nodes are never compared.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from dspark_core.errors import DSparkError
from services.scheduler.leadership.election import Leadership

ATTEMPTS = 3
"""Tries within one `hold`; after this many conflicts another scheduler has the lease."""


class LeaseConflictError(DSparkError):
    """Another client wrote the lease meanwhile, created it first or deleted it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    holder: str
    """Empty: nobody holds it."""
    address: str
    """`host:port` of the holder's gRPC server, or empty."""
    duration_seconds: int
    transitions: int
    renewals: str = ""
    """The holder's renewal time as it wrote it; only compared for equality."""
    created_seconds: int = 0
    """Creation time by the API server's clock, so that a lease deleted and created again has a later term."""
    version: str = ""

    @property
    def term(self) -> int:
        """Term of leadership. It only grows, as transitions and creation times do; on the same scale as Redis
        terms, microseconds."""
        return self.created_seconds * 1_000_000 + self.transitions


class Leases(Protocol):
    """One named Lease. All methods raise UnavailableError if the API server does not answer in time, and
    ConfigError if it refuses."""

    async def get(self) -> Lease | None:
        """None if it does not exist."""
        ...

    async def create(self, lease: Lease) -> Lease:
        """Raises LeaseConflictError if it exists."""
        ...

    async def replace(self, lease: Lease) -> Lease:
        """Raises LeaseConflictError if it is no longer at `lease.version`."""
        ...

    async def close(self) -> None: ...


class KubernetesLeaderLock:
    """A `LeaderLock`."""

    def __init__(
        self,
        leases: Leases,
        *,
        holder: str,
        address: str,
        lock_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`holder` must be unique to the process. `lock_seconds` is rounded up to whole seconds, as a Lease
        requires."""
        self._leases = leases
        self._mine = Lease(
            holder=holder, address=address, duration_seconds=max(1, math.ceil(lock_seconds)), transitions=0
        )
        self._clock = clock
        self._held: Lease | None = None
        self._seen: Lease | None = None
        self._seen_at = 0.0
        self._transitions = -1
        """The most ever seen: somebody may have emptied the lease, and terms must only grow."""

    async def hold(self) -> Leadership:
        for _ in range(ATTEMPTS):
            lease = self._held or await self._look()
            try:
                if lease is None:
                    # Renew it at once: a missing permission to update then shows now, not when it matters.
                    self._written(await self._leases.create(self._succeeding()))
                    continue
                if lease.holder == self._mine.holder:
                    held = await self._leases.replace(lease)
                elif not lease.holder or self._ran_out(lease):
                    held = await self._leases.replace(replace(self._succeeding(), version=lease.version))
                else:
                    return _leadership(lease, leading=False)
                self._written(held)
                return _leadership(held, leading=True)
            except LeaseConflictError:
                self._held = None
        lease = await self._look()
        return _leadership(lease or self._mine, leading=False)

    async def release(self) -> None:
        lease, self._held = self._held, None
        for _ in range(ATTEMPTS):
            if lease is None or lease.holder != self._mine.holder:
                return
            try:
                await self._leases.replace(replace(lease, holder="", address="", duration_seconds=1))
                return
            except LeaseConflictError:
                lease = await self._leases.get()  # a renewal without an answer may have arrived

    async def close(self) -> None:
        await self._leases.close()

    async def _look(self) -> Lease | None:
        lease = await self._leases.get()
        if lease is not None and (self._seen is None or _renewed(self._seen, lease)):
            self._note(lease)
        return lease

    def _written(self, lease: Lease) -> None:
        self._held = lease
        self._note(lease)

    def _note(self, lease: Lease) -> None:
        self._seen, self._seen_at = lease, self._clock()
        self._transitions = max(self._transitions, lease.transitions)

    def _ran_out(self, lease: Lease) -> bool:
        return self._clock() - self._seen_at >= lease.duration_seconds

    def _succeeding(self) -> Lease:
        return replace(self._mine, transitions=self._transitions + 1)


def _renewed(before: Lease, after: Lease) -> bool:
    """Ignores the version: an edited label changes it too, and is no sign of life from the holder."""
    return replace(before, version="") != replace(after, version="")


def _leadership(lease: Lease, *, leading: bool) -> Leadership:
    return Leadership(leading=leading, term=lease.term, leader_address=lease.address)
