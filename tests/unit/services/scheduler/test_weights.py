"""Different weights under one model name are told: in the log once, in a metric, in the health's details."""

import logging
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry

from services.scheduler.scheduler import Scheduler
from tests.support.replicas import new_replica


@pytest.fixture
def metrics() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
async def scheduler(metrics: CollectorRegistry) -> AsyncIterator[Scheduler]:
    one = Scheduler(metrics=metrics)
    await one.start()
    yield one
    await one.close()


async def test_a_rollout_of_weights_is_told_while_it_lasts(
    scheduler: Scheduler, metrics: CollectorRegistry, caplog: pytest.LogCaptureFixture
):
    def served(model: str) -> float | None:
        return metrics.get_sample_value("dspark_scheduler_weights", {"model": model})

    caplog.set_level(logging.INFO)
    for name in ("a", "b", "c", "d"):
        await scheduler.register(new_replica(name, weights="old"))
    await scheduler.register(new_replica("e", model="n", weights="other"))
    assert (served("m"), served("n"), scheduler.weights_problem()) == (1, 1, None)
    for _ in range(3):
        await scheduler.register(new_replica("z", weights="new"))
    told = "verifiers of model m serve different weights: new (z), old (a, b, c and 1 more)"
    assert (served("m"), served("n"), scheduler.weights_problem()) == (2, 1, told)
    assert caplog.text.count(told) == 1
    for name in ("a", "b", "c", "d", "e"):
        await scheduler.deregister(name)
    assert (served("m"), served("n"), scheduler.weights_problem()) == (1, None, None)
    assert "no longer serve different weights" in caplog.text


async def test_unknown_weights_cannot_differ(scheduler: Scheduler, metrics: CollectorRegistry):
    await scheduler.register(new_replica("a", weights="known"))
    await scheduler.register(new_replica("b"))
    assert scheduler.weights_problem() is None
    assert metrics.get_sample_value("dspark_scheduler_weights", {"model": "m"}) == 1
