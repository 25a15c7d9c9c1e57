"""Keeps the scheduler's state and the registry in sync, and bridges times when the registry is down."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from dspark_core.cluster.replicas.state import ClusterState
from dspark_core.cluster.replicas.weights import WeightsWatch
from dspark_core.errors import UnavailableError
from dspark_core.records import Replica
from services.common.lifecycle import end
from services.scheduler.metrics import SchedulerMetrics
from services.scheduler.storage.registry import Registry

_log = logging.getLogger(__name__)


class RegistrySync:
    """Writes through while the registry is up, and reads it every `interval_seconds`.

    While it is down, only this scheduler's own expired leases are forgotten, and writes are not attempted.
    When it is back, own leases are written first, since it may have restarted empty; then `on_back` is
    called, since everything else stored there may be gone, too.
    """

    def __init__(
        self,
        registry: Registry,
        state: ClusterState,
        metrics: SchedulerMetrics,
        *,
        lease_seconds: float,
        interval_seconds: float,
        on_back: Callable[[], None] = lambda: None,
    ) -> None:
        self._registry = registry
        self._state = state
        self._metrics = metrics
        self._weights = WeightsWatch()
        self._lease_seconds = lease_seconds
        self._interval_seconds = interval_seconds
        self._on_back = on_back
        self._up = True
        # Replicas that left, and whether they were removed from the registry. A listing requested before the
        # removal must not bring them back; an entry is dropped after the first listing requested later.
        self._left: dict[str, bool] = {}
        self._task: asyncio.Task[None] | None = None
        self._shown = -1

    @property
    def weights_problem(self) -> str | None:
        """See `WeightsWatch.problem`."""
        return self._weights.problem

    async def start(self) -> None:
        await self._exchange()
        self._task = asyncio.create_task(self._run(), name="registry-sync")

    async def stop(self) -> None:
        if self._task is not None:
            await end(self._task)
            self._task = None
        await self._registry.close()

    async def put(self, replica: Replica) -> None:
        self._left.pop(replica.replica_id, None)
        self._show()
        if self._up:
            try:
                await self._registry.put(replica, self._lease_seconds)
            except UnavailableError as error:
                self._mark_down(error)

    async def renew(self, replica: Replica) -> None:
        """Like `put`, but not requested by the replica, which may leave meanwhile."""
        if not self._up:
            return
        try:
            await self._registry.put(replica, self._lease_seconds)
            if not self._state.is_registered(replica.replica_id):
                # It is unknown which write came last: remove it again, lest this one bring it back.
                self._left[replica.replica_id] = False
                await self._deregister(replica.replica_id)
        except UnavailableError as error:
            self._mark_down(error)

    async def remove(self, replica_id: str) -> None:
        self._left[replica_id] = False
        self._show()
        if self._up:
            try:
                await self._deregister(replica_id)
            except UnavailableError as error:
                self._mark_down(error)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_seconds)
            try:
                await self._exchange()
            except Exception:
                # This task must not end before the scheduler does: without it other schedulers' replicas
                # would never be seen again.
                _log.exception("unexpected error while reading the registry")

    async def _exchange(self) -> None:
        try:
            if not self._up:
                for replica, seconds_left in self._state.leases():
                    await self._registry.put(replica, seconds_left)
            for replica_id in [key for key, told in self._left.items() if not told]:
                await self._deregister(replica_id)
            settled = [key for key, told in self._left.items() if told]
            listed = await self._registry.replicas()
        except UnavailableError as error:
            self._mark_down(error)
        else:
            if not self._up:
                _log.warning("the registry is back")
                self._on_back()
            self._up = True
            self._state.replace_shared(replica for replica in listed if replica.replica_id not in self._left)
            for replica_id in settled:
                self._left.pop(replica_id, None)
        self._metrics.set_registry_up(self._up)
        self._show()

    async def _deregister(self, replica_id: str) -> None:
        await self._registry.remove(replica_id)
        if replica_id in self._left:  # otherwise it registered again meanwhile
            self._left[replica_id] = True

    def _mark_down(self, error: UnavailableError) -> None:
        if self._up:
            _log.warning("going on without the registry: %s", error)
        self._up = False
        self._metrics.set_registry_up(False)

    def _show(self) -> None:
        if self._shown == self._state.changes:  # as after most renewals
            return
        self._shown = self._state.changes
        replicas = self._state.replicas()
        self._metrics.set_replicas(replicas)
        self._metrics.set_weights(self._weights.look(replicas))
