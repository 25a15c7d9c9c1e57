"""The leader lock in Redis: one key with an expiry, taken and renewed by a script."""

from __future__ import annotations

import json
import logging

from redis.asyncio import Redis
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    MovedError,
    NoPermissionError,
    RedisError,
)

from dspark_core.errors import ConfigError
from services.scheduler.leadership.election import Leadership
from services.scheduler.storage.redis_store import DEFAULT_KEYS, RedisKeys, open_redis, redis_unavailable

_log = logging.getLogger(__name__)

# A lock is what this module wrote. Anything else, for example a key set by hand, would never be released.
_READ = """
local function read(key)
  if redis.call('TYPE', key).ok ~= 'string' then return nil end
  local text = redis.call('GET', key)
  local fine, known = pcall(cjson.decode, text)
  if not fine or type(known) ~= 'table' then return nil end
  for _, name in ipairs({'holder', 'address', 'term'}) do
    if type(known[name]) ~= 'string' then return nil end
  end
  if not string.match(known.term, '^%d+$') or #known.term > 18 then return nil end
  return text, known.holder
end
"""
# KEYS: lock. ARGV: holder, address, expiry in ms. A term is Redis' time in microseconds, so terms keep
# growing even if Redis restarts empty. Returns the lock and whether it replaced something else.
_HOLD = (
    _READ
    + """
local text, holder = read(KEYS[1])
local left = redis.call('PTTL', KEYS[1])
if holder == ARGV[1] then redis.call('PEXPIRE', KEYS[1], ARGV[3]) end
if holder and (holder == ARGV[1] or left >= 0) then return {text, 0} end
local now = redis.call('TIME')
local term = now[1] .. string.format('%06d', now[2])
local mine = cjson.encode({holder = ARGV[1], address = ARGV[2], term = term})
local replaces = redis.call('EXISTS', KEYS[1])
redis.call('SET', KEYS[1], mine, 'PX', ARGV[3])
return {mine, replaces}
"""
)
_RELEASE = (
    _READ
    + """
local _, holder = read(KEYS[1])
if holder == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""
)
_NEVER = ("unknown command", "DB index is out of range", "SELECT is not allowed in cluster mode")
"""How a Sentinel refuses whenever it is asked, a Redis without the database, and a member of a cluster."""


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
            answer, replaced = await self._redis.eval(
                _HOLD, 1, self._key, self._holder, self._address, str(self._milliseconds)
            )
        except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
            raise ConfigError(
                f"this scheduler may not hold the leader lock {self._key!r} with the user and password of "
                f"REDIS_URL: {error}"
            ) from error
        except (RedisError, OSError) as error:
            if isinstance(error, MovedError) or str(error).startswith(_NEVER):
                raise ConfigError(
                    f"the server of REDIS_URL cannot hold the leader lock {self._key!r}: {error}"
                ) from error
            raise redis_unavailable(error) from error
        if replaced:
            _log.warning("%s held no leader lock that runs out, it was replaced", self._key)
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
