"""The scheduler's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dspark_core.errors import ConfigError
from services.common.env import Env
from services.common.options import ServerOptions

PORT = 50052
METRICS_PORT = 9052
_LEASE_SECONDS = 10.0
_SYNC_SECONDS = 1.0
_MAX_WAITING = 256
_LOCK_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Built once in main; nothing else reads the environment."""

    server: ServerOptions
    lease_seconds: float = _LEASE_SECONDS
    """A replica that has not renewed for this long is forgotten."""
    sync_seconds: float = _SYNC_SECONDS
    """How often the registry is read for other schedulers' replicas."""
    max_waiting_requests: int = _MAX_WAITING
    """Requests of one tier that may wait until speed floors allow them; further ones get
    RESOURCE_EXHAUSTED."""
    lock_seconds: float = _LOCK_SECONDS
    """A leader that has not renewed its lock for this long is replaced; needs Redis."""
    advertise_address: str = ""
    """Where clients of a standby are sent when this scheduler leads; empty: they find it themselves."""
    redis_url: str | None = None
    """None: replicas are kept in memory and register again after a restart."""

    def __post_init__(self) -> None:
        for name in ("lease_seconds", "sync_seconds", "lock_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be > 0, got {getattr(self, name)}")

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> SchedulerConfig:
        """DSPARK_LEASE_SECONDS, DSPARK_SYNC_SECONDS, REDIS_URL, and those of `ServerOptions`."""
        env = Env(environ)
        return cls(
            server=ServerOptions.from_env(env, port=PORT, metrics_port=METRICS_PORT),
            lease_seconds=env.number("DSPARK_LEASE_SECONDS", _LEASE_SECONDS),
            sync_seconds=env.number("DSPARK_SYNC_SECONDS", _SYNC_SECONDS),
            max_waiting_requests=env.integer("DSPARK_MAX_WAITING_REQUESTS", _MAX_WAITING, minimum=0),
            lock_seconds=env.number("DSPARK_LOCK_SECONDS", _LOCK_SECONDS),
            advertise_address=env.text("DSPARK_ADVERTISE_ADDRESS", ""),
            redis_url=env.optional_text("REDIS_URL"),
        )
