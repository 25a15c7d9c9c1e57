"""Where the scheduler keeps registered replicas: in memory, or in Redis so that they outlive it.

A registry only stores leases; choosing replicas is left to the scheduler.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields
from typing import Protocol

from redis.asyncio import Redis
from redis.exceptions import RedisError

from dspark_core.errors import InvalidRequestError, require
from dspark_core.records import Replica, Role
from services.scheduler.storage.redis_store import DEFAULT_KEYS, RedisKeys, open_redis, redis_unavailable

_log = logging.getLogger(__name__)


class Registry(Protocol):
    """All methods raise UnavailableError while the store is down."""

    async def put(self, replica: Replica, lease_seconds: float) -> None:
        """Stores or renews a replica, which expires after the lease."""
        ...

    async def remove(self, replica_id: str) -> None:
        """Ignores unknown ids."""
        ...

    async def replicas(self) -> tuple[Replica, ...]:
        """Every replica with a running lease, ordered by id."""
        ...

    async def close(self) -> None: ...


class MemoryRegistry:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._leases: dict[str, tuple[Replica, float]] = {}

    async def put(self, replica: Replica, lease_seconds: float) -> None:
        self._leases[replica.replica_id] = (replica, self._clock() + lease_seconds)

    async def remove(self, replica_id: str) -> None:
        self._leases.pop(replica_id, None)

    async def replicas(self) -> tuple[Replica, ...]:
        now = self._clock()
        self._leases = {key: lease for key, lease in self._leases.items() if lease[1] > now}
        return tuple(self._leases[key][0] for key in sorted(self._leases))

    async def close(self) -> None:
        self._leases.clear()


# The index is only a hint: the TTL of each key decides. Index entries are dropped this long after their lease
# ended; the margin keeps clock skew between schedulers from dropping a live one.
_INDEX_SLACK_SECONDS = 3600.0


class RedisRegistry:
    """One key with a TTL per replica, and a sorted set of ids so that listing needs no key scan."""

    def __init__(
        self, url: str, *, keys: RedisKeys = DEFAULT_KEYS, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._redis: Redis = open_redis(url)
        self._keys = keys
        self._index = keys.replicas
        self._wall_clock = wall_clock

    async def put(self, replica: Replica, lease_seconds: float) -> None:
        key = self._keys.replica(replica.replica_id)
        now = self._wall_clock()
        try:
            async with self._redis.pipeline(transaction=True) as batch:
                batch.set(key, replica_to_json(replica), px=max(1, round(lease_seconds * 1000)))
                batch.zadd(self._index, {replica.replica_id: now + lease_seconds})
                batch.zremrangebyscore(self._index, "-inf", now - _INDEX_SLACK_SECONDS)
                await batch.execute()
        except (RedisError, OSError) as error:
            raise redis_unavailable(error) from error

    async def remove(self, replica_id: str) -> None:
        try:
            async with self._redis.pipeline(transaction=True) as batch:
                batch.delete(self._keys.replica(replica_id))
                batch.zrem(self._index, replica_id)
                await batch.execute()
        except (RedisError, OSError) as error:
            raise redis_unavailable(error) from error

    async def replicas(self) -> tuple[Replica, ...]:
        try:
            ids = sorted(str(item) for item in await self._redis.zrange(self._index, 0, -1))
            texts = (
                await self._redis.mget([self._keys.replica(replica_id) for replica_id in ids]) if ids else []
            )
        except (RedisError, OSError) as error:
            raise redis_unavailable(error) from error
        return tuple(
            _readable((name, str(text)) for name, text in zip(ids, texts, strict=True) if text is not None)
        )

    async def close(self) -> None:
        await self._redis.aclose()


_MOST_COUNT = 2**32 - 1  # as the protocol has it


def replica_to_json(replica: Replica) -> str:
    return json.dumps({**asdict(replica), "role": replica.role.value})


def replica_from_json(text: str) -> Replica:
    """Ignores unknown fields: during an upgrade newer schedulers write to the same Redis.

    Raises InvalidRequestError for anything that is not a replica.
    """
    try:
        values = json.loads(text)
        known = {field.name: values[field.name] for field in fields(Replica) if field.name in values}
        for name, value in known.items():
            _check_sendable(name, value)
        return Replica(**{**known, "role": Role(values["role"])})
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidRequestError(f"not a replica record: {text!r} ({error})", field="replica") from error


def _check_sendable(name: str, value: object) -> None:
    """Raises TypeError or ValueError for a value that would fail every listing of the replicas."""
    if name in ("running_requests", "waiting_requests"):
        right: bool = type(value) is int and value <= _MOST_COUNT
    elif name == "free_kv_fraction":
        right = type(value) in (int, float)
    elif name == "draining":
        right = type(value) is bool
    else:
        right = isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)
    if not right:
        raise TypeError(f"{name} got {value!r}")


def _readable(texts: Iterable[tuple[str, str]]) -> Iterator[Replica]:
    """Skips broken records, so that they do not hide the others. Takes pairs of id and record."""
    for replica_id, text in texts:
        try:
            replica = replica_from_json(text)
            require(
                replica.replica_id == replica_id,
                "replica_id",
                replica.replica_id,
                f"{replica_id} as in its key",
            )
        except InvalidRequestError as error:
            _log.warning("skipping an entry of the registry: %s", error)
        else:
            yield replica
