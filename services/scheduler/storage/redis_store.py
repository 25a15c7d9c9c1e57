"""Opens Redis the way the scheduler's stores need it: short timeouts, no hidden retries."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError

from dspark_core.errors import ConfigError, UnavailableError

_SCHEMES = ("redis", "rediss", "unix")


@dataclass(frozen=True, slots=True)
class RedisKeys:
    """The keys of one installation. Two that share a Redis database need different prefixes."""

    prefix: str = "dspark"

    @property
    def leader(self) -> str:
        return f"{self.prefix}:leader"

    @property
    def curves(self) -> str:
        return f"{self.prefix}:curves"

    @property
    def calibration(self) -> str:
        return f"{self.prefix}:calibration"

    @property
    def replicas(self) -> str:
        return f"{self.prefix}:replicas"

    def replica(self, replica_id: str) -> str:
        return f"{self.prefix}:replica:{replica_id}"


DEFAULT_KEYS = RedisKeys()


def open_redis(url: str, *, timeout_seconds: float = 1.0) -> Redis:
    """Connects on first use. Raises ConfigError for an invalid URL or another scheme."""
    scheme = url.partition("://")[0]
    if scheme not in _SCHEMES:
        # Quote only the beginning: the URL may contain a password.
        raise ConfigError(f"REDIS_URL must start with redis://, rediss:// or unix://, got {scheme[:12]!r}")
    # No retries inside the client: a lost connection must reach the caller, which then knows
    # that Redis may have restarted empty and stores again what it holds.
    try:
        return Redis.from_url(
            url,
            decode_responses=True,
            encoding_errors="replace",  # what others wrote may be no UTF-8: it must not hide the rest
            socket_timeout=timeout_seconds,
            socket_connect_timeout=timeout_seconds,
            retry=Retry(NoBackoff(), 0),
        )
    except ValueError:  # its message quotes what it could not parse, perhaps part of a password
        raise ConfigError(
            f"REDIS_URL cannot be read as {scheme}://user:password@host:port/number "
            "(in a password / is %2F, # is %23, ? is %3F)"
        ) from None


def shown_redis_url(url: str) -> str:
    """The URL without user and password, for logs and screens."""
    try:
        parts = urlsplit(url)
        place = parts.path if parts.scheme == "unix" else parts.netloc.rpartition("@")[2] + parts.path
    except ValueError:  # for example an unclosed bracket of an IPv6 address
        return "a URL that cannot be read"
    return f"{parts.scheme}://{place}"


def redis_unavailable(error: Exception) -> UnavailableError:
    does = "refuses" if isinstance(error, ResponseError) else "does not answer"
    return UnavailableError(f"redis {does}: {error}")
