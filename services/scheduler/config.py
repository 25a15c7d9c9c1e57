"""The scheduler's configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from dspark_core.errors import ConfigError
from services.common.env import Env
from services.common.limits import LEAST_PERIOD_SECONDS, MOST_SECONDS
from services.common.options import ServerOptions
from services.scheduler.storage.redis_store import DEFAULT_KEYS, RedisKeys

PORT = 50052
METRICS_PORT = 9052
_LEASE_SECONDS = 10.0
_SYNC_SECONDS = 1.0
_MAX_WAITING = 256
_LOCK_SECONDS = 2.0
_LEASE_NAME = "dspark-scheduler"
_PREFIX = re.compile(r"[A-Za-z0-9._:{}-]{1,64}")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")


class LeaderElection(Enum):
    """How several schedulers agree on which of them leads."""

    AUTO = "auto"
    """Redis if configured, else off."""
    REDIS = "redis"
    LEASE = "lease"
    """A Kubernetes Lease."""
    OFF = "off"
    """This scheduler is the only one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Built once in main; nothing else reads the environment."""

    server: ServerOptions
    lease_seconds: float = _LEASE_SECONDS
    """A replica that has not renewed its lease for this long is forgotten."""
    sync_seconds: float = _SYNC_SECONDS
    """How often the registry is read for other schedulers' replicas."""
    max_waiting_requests: int = _MAX_WAITING
    """Requests per tier that may wait until speed floors allow them; further ones fail with
    RESOURCE_EXHAUSTED."""
    lock_seconds: float = _LOCK_SECONDS
    """A leader that has not renewed its lock for this long is replaced."""
    leader_election: LeaderElection = LeaderElection.AUTO
    leader_lease_name: str = _LEASE_NAME
    leader_lease_namespace: str | None = None
    """None: the pod's or the kubeconfig's current one."""
    advertise_address: str = ""
    """Address to which standbys redirect clients while this scheduler leads; empty: clients must find it."""
    redis_url: str | None = None
    """None: replicas are kept in memory and have to register again after a restart."""
    redis_keys: RedisKeys = DEFAULT_KEYS

    def __post_init__(self) -> None:
        for name in ("lease_seconds", "sync_seconds", "lock_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be > 0, got {getattr(self, name)}")
        if self.leader_election is LeaderElection.REDIS and not self.redis_url:
            raise ConfigError("DSPARK_LEADER_ELECTION is redis: REDIS_URL must be set")
        if not _PREFIX.fullmatch(self.redis_keys.prefix):
            raise ConfigError(
                "DSPARK_REDIS_PREFIX must be 1 to 64 letters, digits, or . _ : { } -, "
                f"got {self.redis_keys.prefix!r}"
            )
        for variable, value in (
            ("DSPARK_LEADER_LEASE_NAME", self.leader_lease_name),
            ("DSPARK_LEADER_LEASE_NAMESPACE", self.leader_lease_namespace),
        ):
            if value is not None and not _NAME.fullmatch(value):
                raise ConfigError(
                    f"{variable} must be a name of lower-case letters, digits, - and ., got {value!r}"
                )

    @property
    def elected_by(self) -> LeaderElection:
        """REDIS, LEASE or OFF."""
        if self.leader_election is not LeaderElection.AUTO:
            return self.leader_election
        return LeaderElection.REDIS if self.redis_url else LeaderElection.OFF

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> SchedulerConfig:
        """Reads the variables below and those of `ServerOptions`."""
        env = Env(environ)
        return cls(
            server=ServerOptions.from_env(env, port=PORT, metrics_port=METRICS_PORT),
            lease_seconds=_period(env, "DSPARK_LEASE_SECONDS", _LEASE_SECONDS),
            sync_seconds=_period(env, "DSPARK_SYNC_SECONDS", _SYNC_SECONDS),
            max_waiting_requests=env.integer("DSPARK_MAX_WAITING_REQUESTS", _MAX_WAITING, minimum=0),
            lock_seconds=_period(env, "DSPARK_LOCK_SECONDS", _LOCK_SECONDS),
            leader_election=LeaderElection(
                env.choice(
                    "DSPARK_LEADER_ELECTION", LeaderElection.AUTO.value, [one.value for one in LeaderElection]
                )
            ),
            leader_lease_name=env.text("DSPARK_LEADER_LEASE_NAME", _LEASE_NAME),
            leader_lease_namespace=env.optional_text("DSPARK_LEADER_LEASE_NAMESPACE"),
            advertise_address=env.address("DSPARK_ADVERTISE_ADDRESS", ""),
            redis_url=env.optional_text("REDIS_URL"),
            redis_keys=RedisKeys(env.text("DSPARK_REDIS_PREFIX", DEFAULT_KEYS.prefix)),
        )


def _period(env: Env, name: str, default: float) -> float:
    return env.number(name, default, minimum=LEAST_PERIOD_SECONDS, maximum=MOST_SECONDS)
