"""A scheduler in its own process, started on entry to the block and killed on exit."""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def scheduler_process(**environ: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.scheduler.main",
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([".", "proto/gen"]),
            "DSPARK_HOST": "127.0.0.1",
            "DSPARK_PORT": "0",
            "DSPARK_METRICS_PORT": "0",
            "DSPARK_DRAIN_SECONDS": "5",
            **environ,
        },
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def ready_port(process: asyncio.subprocess.Process) -> int:
    assert process.stderr is not None
    async with asyncio.timeout(120):
        while line := (await process.stderr.readline()).decode():
            if match := re.search(r"ready on port (\d+)", line):
                return int(match[1])
    raise AssertionError("the process ended before it was ready")
