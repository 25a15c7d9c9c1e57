"""Builds the configured leader lock."""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Mapping

from dspark_core.errors import ConfigError
from services.scheduler.config import LeaderElection, SchedulerConfig
from services.scheduler.leadership.election import LeaderLock, SoleLeader
from services.scheduler.leadership.lease_lock import KubernetesLeaderLock
from services.scheduler.leadership.redis_lock import RedisLeaderLock

_MAX_TIMEOUT_SECONDS = 1.0


def leader_lock(config: SchedulerConfig, environ: Mapping[str, str]) -> LeaderLock:
    """Raises ConfigError if the lock's requirements are not met."""
    holder = uuid.uuid4().hex
    if config.elected_by is LeaderElection.REDIS:
        assert config.redis_url is not None  # checked by SchedulerConfig
        return RedisLeaderLock(
            config.redis_url,
            holder=holder,
            address=config.advertise_address,
            lock_seconds=config.lock_seconds,
            keys=config.redis_keys,
        )
    if config.elected_by is LeaderElection.LEASE:
        return _lease_lock(config, environ, holder)
    return SoleLeader()


def _lease_lock(config: SchedulerConfig, environ: Mapping[str, str], holder: str) -> KubernetesLeaderLock:
    if importlib.util.find_spec("kubernetes") is None:
        raise ConfigError(
            "DSPARK_LEADER_ELECTION=lease needs the Kubernetes client: pip install 'dspark[kubernetes]'"
        )
    # Takes half a second to import and is needed only here.
    from services.scheduler.leadership.kubernetes_leases import KubernetesLeases

    leases = KubernetesLeases.from_env(
        environ,
        name=config.leader_lease_name,
        namespace=config.leader_lease_namespace,
        timeout_seconds=min(_MAX_TIMEOUT_SECONDS, config.lock_seconds / 2),
    )
    return KubernetesLeaderLock(
        leases, holder=holder, address=config.advertise_address, lock_seconds=config.lock_seconds
    )
