"""One scheduler, one drafter, several verifiers and a gateway as processes on this machine."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from pathlib import Path

import httpx

from services.embedded.processes import LOOPBACK, START_SECONDS, ServiceProcess, free_ports

STOP_SECONDS = 10.0
THROTTLE_SECONDS = 0.04
"""Length of a throttling period; a throttled process runs for a part of each."""
_GENERATE = '"/dspark.v1.VerifierService/Generate"'


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    verifiers: int = 2
    dtype: str = "float32"
    kv_cache_mb: int = 256
    max_running: int = 16
    kernels: str = "on"
    """"off": PyTorch's operators instead of the native kernels."""
    verifier_module: str = ""
    """Module that verifiers run instead of their own main."""
    verifier_environ: Mapping[str, str] = field(default_factory=dict)
    """Extra environment of verifiers; `{index}` in a value stands for the verifier's number."""


@dataclass(frozen=True, slots=True)
class VerifierCounts:
    """A verifier's metrics: totals since its start."""

    requests: float
    """Requests received."""
    rounds: float
    """Rounds summed over requests."""
    verified: float
    """Draft tokens verified."""
    plans: float
    """Rounds planned."""
    scheduler_plans: float
    """Of those, with the scheduler's capacity."""

    def since(self, before: VerifierCounts) -> VerifierCounts:
        return VerifierCounts(*(now - then for now, then in zip(astuple(self), astuple(before), strict=True)))

    @property
    def verify_length(self) -> float:
        """Mean draft tokens verified per request and round."""
        return self.verified / self.rounds if self.rounds else 0.0


class Cluster:
    def __init__(self, options: ClusterOptions) -> None:
        self._options = options
        self._ports = free_ports(4 + 2 * options.verifiers)
        self._processes: list[ServiceProcess] = []
        self.verifiers: list[ServiceProcess] = []
        self.scheduler: ServiceProcess | None = None

    @property
    def gateway_address(self) -> str:
        return f"{LOOPBACK}:{self._ports[2]}"

    async def start(self) -> None:
        """Returns once the gateway and every verifier are serving."""
        _, drafter, gateway, http, *others = self._ports
        await self.start_scheduler()
        self._spawn("drafter", drafter)
        for port, metrics in zip(others[::2], others[1::2], strict=True):
            own = {
                "DSPARK_DRAFTER_ADDRESS": f"{LOOPBACK}:{drafter}",
                "DSPARK_METRICS_PORT": str(metrics),
                "DSPARK_REPLICA_ID": f"verifier-{len(self.verifiers)}",
            }
            for name, value in self._options.verifier_environ.items():
                own[name] = value.format(index=len(self.verifiers))
            self.verifiers.append(self._spawn("verifier", port, own, self._options.verifier_module))
            # One after another, because concurrent profiles would disturb each other.
            await self.verifiers[-1].wait_serving(START_SECONDS)
        await self._spawn("gateway", gateway, {"DSPARK_HTTP_PORT": str(http)}).wait_serving(START_SECONDS)

    async def start_scheduler(self) -> None:
        self.scheduler = self._spawn("scheduler", self._ports[0])
        await self.scheduler.wait_serving(START_SECONDS)

    def kill_scheduler(self) -> None:
        assert self.scheduler is not None
        self.scheduler.kill()
        self._processes.remove(self.scheduler)

    async def stop(self) -> None:
        for process in reversed(self._processes):
            await process.stop(STOP_SECONDS)

    async def counts(self) -> list[VerifierCounts]:
        """Current counts of every verifier."""
        ports = self._ports[5::2]
        async with httpx.AsyncClient(timeout=10.0, trust_env=False) as client:
            texts = [(await client.get(f"http://{LOOPBACK}:{port}/metrics")).text for port in ports]
        return [
            VerifierCounts(
                _total(text, "dspark_rpc_requests_total", _GENERATE)
                + _total(text, "dspark_rpc_in_flight", _GENERATE),
                _total(text, "dspark_request_rounds_total"),
                _total(text, "dspark_verified_tokens_total"),
                _total(text, "dspark_plans_total"),
                _total(text, "dspark_plans_total", 'source="scheduler"'),
            )
            for text in texts
        ]

    @contextmanager
    def throttled(self, index: int, share: float) -> Iterator[None]:
        """Let one verifier run for only `share` of the time. It is paused with signals, because competing
        processes would slow down the rest of this small cluster as well."""
        ended = threading.Event()
        verifier = self.verifiers[index]
        thread = threading.Thread(target=_throttle, args=(verifier.pid, share, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def processor_seconds(self) -> dict[str, float]:
        """CPU seconds used so far by each running process, by role; verifiers are numbered."""
        used: dict[str, float] = {}
        for process in self._processes:
            number = f"-{self.verifiers.index(process)}" if process in self.verifiers else ""
            used[process.role + number] = _processor_seconds(process.pid)
        return used

    def _spawn(
        self, role: str, port: int, environ: dict[str, str] | None = None, module: str = ""
    ) -> ServiceProcess:
        options = self._options
        shared = {
            "DSPARK_HOST": LOOPBACK,
            "DSPARK_PORT": str(port),
            "DSPARK_ADVERTISE_ADDRESS": f"{LOOPBACK}:{port}",
            "DSPARK_METRICS_PORT": "off",
            "DSPARK_SCHEDULER_ADDRESS": f"{LOOPBACK}:{self._ports[0]}",
            "DSPARK_DTYPE": options.dtype,
            "DSPARK_KV_CACHE_MB": str(options.kv_cache_mb),
            "DSPARK_MAX_RUNNING": str(options.max_running),
            "DSPARK_TORCH_THREADS": "1",
            "DSPARK_KERNELS": options.kernels,
            "DSPARK_LOG_LEVEL": "WARNING",
        }
        process = ServiceProcess(role, shared | (environ or {}), port, module=module)
        self._processes.append(process)
        return process


def _throttle(pid: int, share: float, ended: threading.Event) -> None:
    """Let a process run for `share` of each period until `ended` is set, then freely."""
    stopped = False
    while not ended.wait(THROTTLE_SECONDS * (1.0 - share if stopped else share)):
        stopped = not stopped
        os.kill(pid, signal.SIGSTOP if stopped else signal.SIGCONT)
    os.kill(pid, signal.SIGCONT)


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _total(text: str, name: str, label: str = "") -> float:
    """Sum over a metric's samples whose labels contain `label`."""
    samples = re.findall(rf"^{name}((?:{{.*}})?) (\S+)$", text, flags=re.MULTILINE)
    return sum(float(value) for labels, value in samples if label in labels)
