"""Seconds of the soak test's mixed load on the whole stack: answers are consistent, nothing is leaked."""

from __future__ import annotations

import asyncio
import os
import time

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.soak_parts.load import Load
from services.embedded.stack import EmbeddedStack

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.timeout(400)]

USERS, SECONDS = 8, 6.0
SETTLE_SECONDS = 20.0


async def idle_metrics(url: str) -> dict[str, float]:
    """Metrics once no request runs or waits; it takes a moment to notice that clients left."""
    ends = time.monotonic() + SETTLE_SECONDS
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        while True:
            families = text_string_to_metric_families((await client.get("/metrics")).text)
            found = {s.name: s.value for family in families for s in family.samples if not s.labels}
            if not found["dspark_running_requests"] + found["dspark_waiting_requests"]:
                return found
            assert time.monotonic() < ends, "requests were still held with all clients gone"
            await asyncio.sleep(0.1)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files through /proc")
async def test_mixed_load_is_answered_alike_and_leaves_nothing_behind(stack: EmbeddedStack) -> None:
    load = Load(stack.url, "smollm2-135m-instruct", USERS)
    await load.run(SECONDS)
    await idle_metrics(stack.url)
    before = open_files()
    await load.run(SECONDS)
    metrics = await idle_metrics(stack.url)
    assert (load.errors, load.differing) == ([], [])
    assert load.tokens > 0
    assert load.compared > 0
    assert metrics["dspark_free_kv_fraction"] == 1.0
    assert open_files() <= before + 2
