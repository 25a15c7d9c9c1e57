"""The scheduler's configuration, and how its process refuses a bad one."""

import pytest

from dspark_core.errors import ConfigError
from services.scheduler.config import SchedulerConfig
from services.scheduler.storage.registry import RedisRegistry


def test_defaults():
    config = SchedulerConfig.from_env({})
    assert config.server.port == 50052
    assert config.lease_seconds == 10.0
    assert config.redis_url is None


def test_environment():
    config = SchedulerConfig.from_env(
        {"DSPARK_PORT": "0", "DSPARK_LEASE_SECONDS": "2.5", "REDIS_URL": "redis://r:6379/1"}
    )
    assert (config.server.port, config.lease_seconds, config.redis_url) == (0, 2.5, "redis://r:6379/1")


@pytest.mark.parametrize("name", ["DSPARK_LEASE_SECONDS", "DSPARK_SYNC_SECONDS"])
def test_times_must_be_positive(name: str):
    with pytest.raises(ConfigError, match=name):
        SchedulerConfig.from_env({name: "0"})


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret@redis:6379",
        "redis://user:secret@redis:port",
        "redis://:secret/2@redis:6379",  # redis-py names what stands before the slash
        "redis://user:secret@redis:6379?socket_timeout=secret",
    ],
)
def test_a_bad_redis_url_is_refused_without_showing_its_password(url):
    with pytest.raises(ConfigError, match="REDIS_URL") as caught:
        RedisRegistry(url)
    assert "secret" not in str(caught.value)
