"""Starts the serving process and samples it while it is idle."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

START_SECONDS = 180.0
SETTLE_SECONDS = 30.0
"""Time limit for cancelled requests to end."""
STOP_SECONDS = 40.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """State of the idle serving process."""

    minute: float
    rss_mb: float
    open_files: int
    tasks: int
    threads: int
    objects: int
    """Objects tracked by Python's garbage collector."""
    free_kv_fraction: float
    tokens_per_second: float
    """Over the preceding period."""
    preemptions: int


@dataclass(frozen=True, slots=True)
class Serving:
    process: asyncio.subprocess.Process
    url: str

    @classmethod
    async def start(cls, *, dtype: str, kv_cache_mb: int, threads: int) -> Serving:
        """Raises RuntimeError when the process ends before it serves."""
        options = ["--dtype", dtype, "--kv-cache-mb", str(kv_cache_mb), "--threads", str(threads)]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "benchmarks.soak_parts.serving", *options),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), START_SECONDS)
        if not line:
            raise RuntimeError(f"the serving process ended with {await process.wait()} before it served")
        return cls(process, line.decode().strip())

    async def stop(self) -> int:
        """-> its exit status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            return await asyncio.wait_for(self.process.wait(), STOP_SECONDS)
        except TimeoutError:
            self.process.kill()
            return await self.process.wait()

    async def model(self) -> str:
        async with httpx.AsyncClient(base_url=self.url) as client:
            return str((await client.get("/v1/models")).json()["data"][0]["id"])

    async def sample(self, minute: float, tokens_per_second: float) -> Sample:
        metrics = await self._idle_metrics()
        counts = await self._counts()  # also frees garbage and cached memory
        root = Path(f"/proc/{self.process.pid}")
        return Sample(
            minute=minute,
            rss_mb=_resident_kb(root) / 1024,
            open_files=len(list((root / "fd").iterdir())),
            tasks=counts["tasks"],
            threads=counts["threads"],
            objects=counts["objects"],
            free_kv_fraction=metrics["dspark_free_kv_fraction"],
            tokens_per_second=tokens_per_second,
            preemptions=int(metrics["dspark_preemptions_total"]),
        )

    async def _idle_metrics(self) -> dict[str, float]:
        """Metrics once no request is running or waiting, or those after SETTLE_SECONDS."""
        ends = time.monotonic() + SETTLE_SECONDS
        async with httpx.AsyncClient(base_url=self.url, timeout=30.0) as client:
            while True:
                text = (await client.get("/metrics")).text
                families = text_string_to_metric_families(text)
                found = {s.name: s.value for family in families for s in family.samples if not s.labels}
                if not found["dspark_running_requests"] + found["dspark_waiting_requests"]:
                    break
                if time.monotonic() > ends:
                    break
                await asyncio.sleep(0.2)
        await asyncio.sleep(0.5)  # let connections of departed clients close
        return found

    async def _counts(self) -> dict[str, int]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"\n")
        await self.process.stdin.drain()
        counts: dict[str, int] = json.loads(await self.process.stdout.readline())
        return counts


def _resident_kb(root: Path) -> int:
    lines = (root / "status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
