"""The leader lock in Redis: one key with an expiry, taken and renewed by a script."""

from __future__ import annotations

import json

from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError, RedisError

from dspark_core.errors import ConfigError
from services.scheduler.leadership.election import Leadership
from services.scheduler.storage.redis_store import DEFAULT_KEYS, RedisKeys, open_redis, redis_unavailable

# KEYS: lock. ARGV: holder, address, expiry in ms. A term is Redis' time in microseconds, so terms keep
# growing even if Redis restarts empty.
_HOLD = """
local held = redis.call('GET', KEYS[1])
if held then
  local known = cjson.decode(held)
  if known.holder ~= ARGV[1] then return held end
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
  return held
end
local now = redis.call('TIME')
local term = now[1] .. string.format('%06d', now[2])
local mine = cjson.encode({holder = ARGV[1], address = ARGV[2], term = term})
redis.call('SET', KEYS[1], mine, 'PX', ARGV[3])
return mine
"""
_RELEASE = """
local held = redis.call('GET', KEYS[1])
if held and cjson.decode(held).holder == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""


class RedisLeaderLock:
    def __init__(
        self, url: str, *, holder: str, address: str, lock_seconds: float, keys: RedisKeys = DEFAULT_KEYS
    ) -> None:
        """`holder` must be unique to the process. Raises ConfigError for an invalid URL."""
        self._redis: Redis = open_redis(url, timeout_seconds=min(1.0, lock_seconds / 2))
        self._key = keys.leader
        self._holder = holder
        self._address = address
        self._milliseconds = max(1, round(lock_seconds * 1000))

    async def hold(self) -> Leadership:
        try:
            answer = await self._redis.eval(
                _HOLD, 1, self._key, self._holder, self._address, str(self._milliseconds)
            )
        except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
            raise ConfigError(
                f"this scheduler may not hold the leader lock {self._key!r} with the user and password of "
                f"REDIS_URL: {error}"
            ) from error
        except (RedisError, OSError) as error:
            raise redis_unavailable(error) from error
        known = json.loads(answer)
        return Leadership(
            leading=known["holder"] == self._holder,
            term=int(known["term"]),
            leader_address=str(known["address"]),
        )

    async def release(self) -> None:
        try:
            await self._redis.eval(_RELEASE, 1, self._key, self._holder)
        except (RedisError, OSError) as error:
            raise redis_unavailable(error) from error

    async def close(self) -> None:
        await self._redis.aclose()
