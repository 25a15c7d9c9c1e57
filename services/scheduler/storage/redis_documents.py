"""Documents in a Redis hash, written only by the leading scheduler."""

from __future__ import annotations

from redis import exceptions
from redis.asyncio import Redis

from services.scheduler.storage.redis_store import DEFAULT_KEYS, RedisKeys, open_redis, redis_unavailable

# KEYS: lock, hash. ARGV: term, then alternating fields and values. Check and write are one atomic step, so a
# leader that was replaced meanwhile writes nothing.
_SAVE = """
local held = redis.call('GET', KEYS[1])
if not held or cjson.decode(held).term ~= ARGV[1] then return 0 end
for i = 2, #ARGV, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
return 1
"""
GUARD_SECONDS = 60
"""A term that wrote nothing for this long no longer excludes older ones: if it came from a clock that was
ahead, later leaders could otherwise never write again."""
# For leaders elected elsewhere: KEYS[1] holds the newest term that wrote; older terms are refused. A leader
# that has not reached its lock yet has term 0: it overwrites none that has, and keeps no other out.
_SAVE_BY_TERM = f"""
local newest = redis.call('GET', KEYS[1])
if newest and tonumber(newest) > tonumber(ARGV[1]) then return 0 end
if ARGV[1] ~= '0' then redis.call('SET', KEYS[1], ARGV[1], 'EX', {GUARD_SECONDS}) end
for i = 2, #ARGV, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
return 1
"""


class RedisDocumentStore:
    def __init__(self, url: str, key: str, *, locked: bool = True, keys: RedisKeys = DEFAULT_KEYS) -> None:
        """`key` names the hash. `locked`: leaders are elected by the lock in the same Redis. Raises
        ConfigError for an invalid URL."""
        self._key = key
        self._script, self._guard = (_SAVE, keys.leader) if locked else (_SAVE_BY_TERM, f"{key}:term")
        self._redis: Redis = open_redis(url)

    async def load(self) -> dict[str, str]:
        try:
            try:
                found = await self._redis.hgetall(self._key)
            except exceptions.ConnectionError:
                # The idle connection may have been lost since the last call, and a leader loads only once.
                found = await self._redis.hgetall(self._key)
        except (exceptions.RedisError, OSError) as error:
            raise redis_unavailable(error) from error
        return {str(name): str(document) for name, document in found.items()}

    async def save(self, documents: dict[str, str], term: int) -> bool:
        pairs = [part for pair in documents.items() for part in pair]
        try:
            return bool(await self._redis.eval(self._script, 2, self._guard, self._key, str(term), *pairs))
        except (exceptions.RedisError, OSError) as error:
            raise redis_unavailable(error) from error

    async def close(self) -> None:
        await self._redis.aclose()
