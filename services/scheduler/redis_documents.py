"""Documents in a Redis hash, written by the leading scheduler alone."""

from __future__ import annotations

from redis import exceptions
from redis.asyncio import Redis

from services.scheduler.redis_lock import LEADER_KEY
from services.scheduler.redis_store import open_redis, redis_unavailable

CURVES_KEY = "dspark:curves"
CALIBRATION_KEY = "dspark:calibration"
# KEYS[1] lock, KEYS[2] the hash; ARGV term, then field and value in turns. The check and the write are
# one step, so that a leader that was replaced meanwhile writes nothing.
_SAVE = """
local held = redis.call('GET', KEYS[1])
if not held or cjson.decode(held).term ~= ARGV[1] then return 0 end
for i = 2, #ARGV, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
return 1
"""
GUARD_SECONDS = 60
"""A term that wrote nothing for so long keeps older ones out no more: it may have been of a clock that was
ahead, and whoever leads since could never write again."""
# The same when leaders are elected elsewhere: KEYS[1] holds the newest term that wrote, and an older one is
# refused. Term 0 is of a scheduler that is alone.
_SAVE_BY_TERM = f"""
local newest = redis.call('GET', KEYS[1])
if ARGV[1] ~= '0' then
  if newest and tonumber(newest) > tonumber(ARGV[1]) then return 0 end
  redis.call('SET', KEYS[1], ARGV[1], 'EX', {GUARD_SECONDS})
end
for i = 2, #ARGV, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
return 1
"""


class RedisDocumentStore:
    def __init__(self, url: str, key: str, *, locked: bool = True) -> None:
        """`key`: of the hash. `locked`: the leader is elected by the lock in the same Redis. Raises
        ConfigError for a URL that is none."""
        self._key = key
        self._script, self._guard = (_SAVE, LEADER_KEY) if locked else (_SAVE_BY_TERM, f"{key}:term")
        self._redis: Redis = open_redis(url)

    async def load(self) -> dict[str, str]:
        try:
            try:
                found = await self._redis.hgetall(self._key)
            except exceptions.ConnectionError:
                # It was lost since the last call, seconds or hours ago; leaders read once, when they begin.
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
