"""Documents in a Redis hash, written by the leading scheduler alone."""

from __future__ import annotations

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.common.redis_store import open_redis, redis_unavailable
from services.scheduler.redis_lock import LEADER_KEY

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


class RedisDocumentStore:
    def __init__(self, url: str, key: str) -> None:
        """`key`: of the hash. Raises ConfigError for a URL that is none."""
        self._key = key
        self._redis: Redis = open_redis(url)

    async def load(self) -> dict[str, str]:
        try:
            found = await self._redis.hgetall(self._key)
        except (RedisError, OSError) as error:
            raise redis_unavailable(error) from error
        return {str(name): str(document) for name, document in found.items()}

    async def save(self, documents: dict[str, str], term: int) -> None:
        pairs = [part for pair in documents.items() for part in pair]
        try:
            await self._redis.eval(_SAVE, 2, LEADER_KEY, self._key, str(term), *pairs)
        except (RedisError, OSError) as error:
            raise redis_unavailable(error) from error

    async def close(self) -> None:
        await self._redis.aclose()
