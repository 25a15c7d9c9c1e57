"""A verifier whose rounds all fail exits, so that its supervisor restarts it."""

from __future__ import annotations

import asyncio
import os
import sys

import pytest

from dspark_core.errors import DSparkError
from dspark_core.records import GenerateRequest
from services.common.channels import open_channel
from services.common.clients import VerifierClient
from tests.support.ports import free_ports

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.timeout(400)]

BROKEN = """
import sys
from dspark_core.engine.rounds.loop import RoundLoop
from services.verifier.main import main

def step(self):
    raise MemoryError("the device is lost")

RoundLoop.step = step
sys.exit(main())
"""


async def test_a_broken_verifier_ends_with_an_exit_code() -> None:
    (port,) = free_ports(1)
    environ = {
        **os.environ,
        "PYTHONPATH": ".:proto/gen",
        "DSPARK_HOST": "127.0.0.1",
        "DSPARK_PORT": str(port),
        "DSPARK_METRICS_PORT": "off",
        "DSPARK_PROFILE": "off",
        "DSPARK_KV_CACHE_MB": "64",
        "DSPARK_TORCH_THREADS": "1",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", BROKEN, env=environ, stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    while b"ready on port" not in (line := await process.stderr.readline()):
        assert line, "it ended before it was ready"
    async with open_channel(f"127.0.0.1:{port}") as channel:
        client = VerifierClient(channel)
        for number in range(6):
            request = GenerateRequest(request_id=str(number), prompt_token_ids=(1, 2), max_tokens=4)
            with pytest.raises(DSparkError):
                _ = [chunk async for chunk in client.generate(request, deadline_seconds=30)]
        log = (await asyncio.wait_for(process.stderr.read(), 60)).decode()
    assert await process.wait() == 1
    assert "the verifier is broken: the last 6 rounds failed" in log
