"""Settings of every gRPC server of the project."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_core.errors import ConfigError
from services.common.env import Env
from services.common.limits import MAX_MESSAGE_BYTES, MOST_MESSAGE_BYTES, MOST_SECONDS
from services.common.tls import Tls

_HOST = "0.0.0.0"
_DRAIN_SECONDS = 20.0
_MAX_CALLS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    port: int
    """0 binds a free port; `GrpcServer.port` says which."""
    host: str = _HOST
    drain_seconds: float = _DRAIN_SECONDS
    """How long calls in flight may continue after SIGTERM."""
    max_calls: int = _MAX_CALLS
    """Calls in flight, but for methods that count apart; further ones get RESOURCE_EXHAUSTED."""
    max_connection_seconds: float = 0.0
    """Connections, with their streams, are closed after about this time; 0: never. Behind a virtual IP,
    clients would otherwise stay with the replica they first reached, and new replicas would get no work."""
    unary_timeout_seconds: float = 30.0
    """Deadline of unary calls that come without one."""
    max_message_bytes: int = MAX_MESSAGE_BYTES
    max_arriving_bytes: int | None = None
    """For requests that have not arrived completely; others wait. None: no limit, callers are trusted."""
    metrics_port: int | None = None
    """HTTP port of `/metrics`; None: not served. 0 binds a free port."""
    tls: Tls | None = None
    """For calls to this server and the service's own calls to others; None: plain text."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be in [0, 65535], got {self.port}")
        if not 0 <= self.drain_seconds <= MOST_SECONDS:
            raise ConfigError(f"drain_seconds must be in [0, {MOST_SECONDS:g}], got {self.drain_seconds}")
        if not 0 <= self.max_connection_seconds <= MOST_SECONDS:
            raise ConfigError(
                f"max_connection_seconds must be in [0, {MOST_SECONDS:g}], got {self.max_connection_seconds}"
            )
        if not 1 <= self.max_message_bytes <= MOST_MESSAGE_BYTES:
            raise ConfigError(
                f"max_message_bytes must be in [1, {MOST_MESSAGE_BYTES}], got {self.max_message_bytes}"
            )
        if self.max_calls < 1:
            raise ConfigError(f"max_calls must be >= 1, got {self.max_calls}")

    @property
    def max_arriving(self) -> int | None:
        """How many requests may arrive at a time."""
        most = self.max_arriving_bytes
        return None if most is None else max(1, most // self.max_message_bytes)

    @classmethod
    def from_env(cls, env: Env, *, port: int, metrics_port: int) -> ServerOptions:
        """Reads DSPARK_HOST, _PORT, _METRICS_PORT (or "off"), _DRAIN_SECONDS, _MAX_CALLS,
        _MAX_CONNECTION_SECONDS and the variables of `Tls`."""
        metrics_off = env.optional_text("DSPARK_METRICS_PORT") == "off"
        return cls(
            port=env.integer("DSPARK_PORT", port, minimum=0, maximum=65535),
            host=env.text("DSPARK_HOST", _HOST),
            drain_seconds=env.number("DSPARK_DRAIN_SECONDS", _DRAIN_SECONDS, minimum=0, maximum=MOST_SECONDS),
            max_calls=env.integer("DSPARK_MAX_CALLS", _MAX_CALLS, minimum=1),
            max_connection_seconds=env.number(
                "DSPARK_MAX_CONNECTION_SECONDS", 0.0, minimum=0, maximum=MOST_SECONDS
            ),
            metrics_port=None
            if metrics_off
            else env.integer("DSPARK_METRICS_PORT", metrics_port, minimum=0, maximum=65535),
            tls=Tls.from_env(env),
        )
