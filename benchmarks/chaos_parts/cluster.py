"""A cluster of killable processes: Redis, two schedulers, two drafter-verifier pairs and a gateway."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping

import httpx

from dspark_core.errors import ConfigError
from services.embedded.processes import LOOPBACK, START_SECONDS, ServiceProcess, free_ports

STOP_SECONDS = 15.0
REDIS_SECONDS = 10.0
PAIRS = 2


class Part:
    """A process that can be killed, halted and restarted at the same address."""

    def __init__(self, name: str, role: str, environ: Mapping[str, str], port: int) -> None:
        self.name = name
        self._role, self._environ, self.port = role, environ, port
        self._process: ServiceProcess | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.exit_code is None

    async def start(self) -> None:
        """Returns once it is serving."""
        self._process = ServiceProcess(self._role, self._environ, self.port)
        await self._process.wait_serving(START_SECONDS)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def send(self, number: signal.Signals) -> None:
        if self._process is not None and self.running:
            os.kill(self._process.pid, number)

    async def stop(self) -> None:
        if self._process is not None:
            self.send(signal.SIGCONT)
            await self._process.stop(STOP_SECONDS)


class RedisPart(Part):
    def __init__(self, port: int) -> None:
        super().__init__("redis", "redis", {}, port)
        executable = shutil.which("redis-server")
        if executable is None:
            raise ConfigError("redis-server is needed: install Debian's package of that name")
        self._executable = executable
        self._directory = tempfile.TemporaryDirectory()
        self._server: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._server is not None and self._server.poll() is None

    async def start(self) -> None:
        """Starts empty; earlier contents are lost."""
        command = [
            self._executable,
            "--port",
            str(self.port),
            "--bind",
            LOOPBACK,
            "--save",
            "",
            "--daemonize",
            "no",
        ]
        self._server = subprocess.Popen(command, cwd=self._directory.name, stdout=subprocess.DEVNULL)
        async with asyncio.timeout(REDIS_SECONDS):
            while not await _listens(self.port):
                await asyncio.sleep(0.05)

    def kill(self) -> None:
        if self._server is not None:
            self._server.kill()
            self._server.wait()

    def send(self, number: signal.Signals) -> None:
        if self._server is not None and self.running:
            self._server.send_signal(number)

    async def stop(self) -> None:
        self.kill()  # nothing to save; the directory is removed with this object


class Cluster:
    """`parts` by name: redis, scheduler-0, scheduler-1, drafter-0, verifier-0, ..., gateway."""

    def __init__(self, *, dtype: str, kv_cache_mb: int) -> None:
        redis, *ports = free_ports(1 + 2 + 3 * PAIRS + 2)
        schedulers, pairs, self._http = ports[:2], ports[2:-2], ports[-1]
        shared = {
            "DSPARK_HOST": LOOPBACK,
            "DSPARK_METRICS_PORT": "off",
            "DSPARK_SCHEDULER_ADDRESS": ",".join(f"{LOOPBACK}:{port}" for port in schedulers),
            "REDIS_URL": f"redis://{LOOPBACK}:{redis}",
            "DSPARK_DTYPE": dtype,
            "DSPARK_KV_CACHE_MB": str(kv_cache_mb),
            "DSPARK_TORCH_THREADS": "1",
            "DSPARK_LOG_LEVEL": "WARNING",
        }
        self.parts: dict[str, Part] = {"redis": RedisPart(redis)}
        self._metrics: dict[str, int] = {}
        for number, port in enumerate(schedulers):
            self._add(f"scheduler-{number}", "scheduler", shared, port)
        for number in range(PAIRS):
            drafter, verifier, metrics = pairs[3 * number : 3 * number + 3]
            self._add(f"drafter-{number}", "drafter", shared, drafter)
            own = {
                "DSPARK_DRAFTER_ADDRESS": f"{LOOPBACK}:{drafter}",
                "DSPARK_METRICS_PORT": str(metrics),
                "DSPARK_REPLICA_ID": f"verifier-{number}",
            }
            self._add(f"verifier-{number}", "verifier", shared | own, verifier)
            self._metrics[f"verifier-{number}"] = metrics
        self._add("gateway", "gateway", shared | {"DSPARK_HTTP_PORT": str(self._http)}, ports[-2])

    def _add(self, name: str, role: str, environ: Mapping[str, str], port: int) -> None:
        own = {"DSPARK_PORT": str(port), "DSPARK_ADVERTISE_ADDRESS": f"{LOOPBACK}:{port}"}
        self.parts[name] = Part(name, role, {**environ, **own}, port)

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self._http}"

    async def start(self) -> None:
        """Start one part after another, because concurrent profiles would disturb each other."""
        for part in self.parts.values():
            await part.start()

    async def stop(self) -> None:
        for part in reversed(self.parts.values()):
            await part.stop()

    async def model(self) -> str:
        async with httpx.AsyncClient(timeout=10.0, trust_env=False) as client:
            answer = (await client.get(f"{self.url}/v1/models")).json()
        name: str = answer["data"][0]["id"]
        return name

    async def free_kv_fractions(self) -> dict[str, float]:
        """Free share of the KV pages by verifier; 1 when idle. Raises LookupError if one does not tell."""
        async with httpx.AsyncClient(timeout=10.0, trust_env=False) as client:
            texts = {
                name: (await client.get(f"http://{LOOPBACK}:{port}/metrics")).text
                for name, port in self._metrics.items()
            }
        return {name: _sample(text, "dspark_free_kv_fraction") for name, text in texts.items()}


def _sample(metrics: str, name: str) -> float:
    """Raises LookupError if there is no such metric."""
    found = re.search(rf"^{name}(?:{{.*}})? (\S+)$", metrics, flags=re.MULTILINE)
    if found is None:
        raise LookupError(f"a verifier exposes no {name}")
    return float(found[1])


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(LOOPBACK, port)
    except OSError:
        return False
    writer.close()
    return True
