"""A verifier that cannot use its drafter says so where operators look."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx

from services.common.lifecycle import end
from services.verifier import wiring
from tests.integration.drafting.test_reconnecting import idle_drafter
from tests.support.ports import free_ports

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"


def environment(port: int, metrics_port: int, drafter_port: int) -> dict[str, str]:
    return {
        "DSPARK_TARGET_MODEL": str(GOLDEN / "qwen3_tiny_target"),
        "DSPARK_DRAFTER": str(GOLDEN / "dspark_vanilla"),
        "DSPARK_DRAFTER_ADDRESS": f"127.0.0.1:{drafter_port}",
        "DSPARK_DTYPE": "float32",
        "DSPARK_KV_CACHE_MB": "4",
        "DSPARK_PROFILE": "off",
        "DSPARK_LOOKUP": "off",
        "DSPARK_HOST": "127.0.0.1",
        "DSPARK_PORT": str(port),
        "DSPARK_METRICS_PORT": str(metrics_port),
    }


async def test_a_drafter_of_another_model_shows_in_readiness_and_metrics() -> None:
    port, metrics_port = free_ports(2)
    async with idle_drafter() as drafter, httpx.AsyncClient(timeout=20) as client:
        verifier = asyncio.create_task(wiring.run(environment(port, metrics_port, drafter.port)))

        async def shown(path: str) -> str:
            return (await client.get(f"http://127.0.0.1:{metrics_port}/{path}")).text

        async with asyncio.timeout(120):
            while True:
                assert not verifier.done(), verifier.exception()
                try:
                    readiness = await shown("readyz")
                except httpx.TransportError:
                    readiness = ""
                if "drafter: the drafter serves" in readiness and not readiness.startswith("not"):
                    break
                await asyncio.sleep(0.05)
        assert "dspark_drafter_connected 0.0" in await shown("metrics")
        await end(verifier)
