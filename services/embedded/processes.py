"""The four services as four processes on loopback gRPC: the cluster's wiring on one machine."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dspark_core.errors import UnavailableError
from services.common.addresses import address_of, reachable_host
from services.common.channels import open_channel
from services.common.env import Env
from services.common.process import PARENT, STACKS_SIGNAL
from services.common.tls import Tls
from services.embedded.options import StackOptions
from services.embedded.ports import require_free

_log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
START_SECONDS = 300.0
"""Enough to load and profile a model on a slow machine."""
POLL_SECONDS = 0.1
KILL_GRACE_SECONDS = 5.0
STACKS_SECONDS = 0.5
"""Time for a hung process to print its stacks."""


class ServiceProcess:
    """One `python -m services.<role>.main` in its own session, so that Ctrl-C in the terminal reaches only
    the parent, which stops its children in order."""

    def __init__(
        self, role: str, environ: Mapping[str, str], port: int, *, host: str = LOOPBACK, module: str = ""
    ) -> None:
        """`host`: what it listens on. `module`: what to run instead of the role's own main."""
        self.role = role
        self.port = port
        self._address = address_of(reachable_host(host), port)
        # Clients call the gateway without TLS, even where the services use it among themselves.
        self._tls = None if role == "gateway" else Tls.from_env(Env({**os.environ, **environ}))
        command = [sys.executable, "-m", module or f"services.{role}.main"]
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **environ, PARENT: str(os.getpid())},
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    async def wait_serving(self, seconds: float) -> None:
        """Waits until its health service says SERVING. Raises UnavailableError if the process ends before."""
        async with open_channel(self._address, tls=self._tls) as channel, asyncio.timeout(seconds):
            stub = health_pb2_grpc.HealthStub(channel)
            while not await _serving(stub):
                if self.exit_code is not None:
                    raise UnavailableError(
                        f"the {self.role} ended before it was ready ({in_words(self.exit_code)}), see its log"
                    )
                await asyncio.sleep(POLL_SECONDS)

    async def stop(self, seconds: float) -> None:
        """Sends SIGTERM, then SIGKILL if the process is still running after `seconds`."""
        if self.exit_code is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(seconds):
                while self.exit_code is None:
                    await asyncio.sleep(POLL_SECONDS / 2)
        except TimeoutError:
            _log.warning("the %s did not end within %g s, killing it; its stacks follow", self.role, seconds)
            self._process.send_signal(STACKS_SIGNAL)
            await asyncio.sleep(STACKS_SECONDS)
            self.kill()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class ProcessStack:
    """Starts each service before those that call it, and stops them in the opposite order."""

    def __init__(self, options: StackOptions, gateway: Mapping[str, str] | None = None) -> None:
        """`gateway`: further environment variables for the gateway."""
        self._options = options
        self._gateway = gateway or {}
        self.processes: dict[str, ServiceProcess] = {}

    @property
    def computed_by(self) -> None:
        """Not known here; the verifier logs it."""

    async def start(self) -> None:
        """Returns when all services are ready. Raises UnavailableError, and ConfigError for a taken port."""
        options = self._options
        require_free(options.host, (options.http_port, options.grpc_port))
        scheduler, drafter, verifier = free_ports(3)
        shared = self._shared_environ(scheduler)
        self._spawn("scheduler", shared, scheduler)
        if options.drafter is not None:
            self._spawn("drafter", shared, drafter)
        address = f"{LOOPBACK}:{drafter}" if options.drafter is not None else ""
        self._spawn("verifier", shared | {"DSPARK_DRAFTER_ADDRESS": address}, verifier)
        gateway = {
            "DSPARK_HOST": options.host,
            "DSPARK_HTTP_PORT": str(options.http_port),
            "DSPARK_ADMISSION_WAIT_SECONDS": str(options.admission_wait_seconds),
        }
        self._spawn("gateway", shared | gateway | dict(self._gateway), options.grpc_port, options.host)
        try:
            await asyncio.gather(*(p.wait_serving(START_SECONDS) for p in self.processes.values()))
        except TimeoutError:
            raise UnavailableError(f"not all services were ready within {START_SECONDS:g} s") from None

    async def wait(self) -> str:
        """Returns when any process but the drafter has ended, and says which and how."""
        running = dict(self.processes)
        while True:
            for role, process in tuple(running.items()):
                if process.exit_code is None:
                    continue
                message = f"the {role} has ended ({in_words(process.exit_code)})"
                if role != "drafter":
                    return message
                _log.warning("%s: rounds go on without its drafts, and nothing restarts it here", message)
                del running[role]
            await asyncio.sleep(POLL_SECONDS)

    async def stop(self) -> None:
        limit = self._options.drain_seconds + KILL_GRACE_SECONDS
        for role in ("gateway", "verifier", "drafter", "scheduler"):
            if role in self.processes:
                await self.processes[role].stop(limit)

    def kill(self) -> None:
        """At once, without a drain."""
        for process in self.processes.values():
            process.kill()

    def _spawn(self, role: str, environ: Mapping[str, str], port: int, host: str = LOOPBACK) -> None:
        own = {"DSPARK_PORT": str(port), "DSPARK_ADVERTISE_ADDRESS": f"{LOOPBACK}:{port}"}
        self.processes[role] = ServiceProcess(role, {**environ, **own}, port, host=host)

    def _shared_environ(self, scheduler_port: int) -> dict[str, str]:
        options = self._options
        environ = {
            "DSPARK_HOST": LOOPBACK,
            "DSPARK_METRICS_PORT": "0",
            "DSPARK_SCHEDULER_ADDRESS": f"{LOOPBACK}:{scheduler_port}",
            "DSPARK_TARGET_MODEL": options.target_model,
            "DSPARK_DRAFTER": options.drafter or "",
            "DSPARK_DTYPE": options.dtype,
            "DSPARK_LOOKUP": "true" if options.lookup else "false",
            "DSPARK_NGRAMS": options.ngrams,
            "DSPARK_DEVICE": options.device,
            "DSPARK_WEIGHTS": options.weights,
            "DSPARK_ENGINE": options.target_engine,
            "DSPARK_VLLM_ARGUMENTS": json.dumps(dict(options.vllm_arguments)),
            "DSPARK_KV_CACHE_MB": str(options.kv_cache_mb),
            "DSPARK_MAX_RUNNING": str(options.max_running),
            "DSPARK_DRAIN_SECONDS": str(options.drain_seconds),
        }
        if options.trace_file is not None:
            environ["DSPARK_TRACE_FILE"] = str(options.trace_file.resolve())
            environ["DSPARK_TRACE_SAMPLE"] = str(options.trace_sample)
            environ["DSPARK_TRACE_MAX_MB"] = str(options.trace_max_mb)
        if options.threads is not None:
            environ["DSPARK_TORCH_THREADS"] = str(options.threads)
        return environ


def in_words(exit_code: int) -> str:
    return f"exit code {exit_code}" if exit_code >= 0 else f"killed by signal {-exit_code}"


async def _serving(stub: health_pb2_grpc.HealthStub) -> bool:
    try:
        response = await stub.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
    except grpc.aio.AioRpcError:
        return False
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def free_ports(count: int) -> list[int]:
    """Distinct free ports. Another process may still take one before it is used, which then fails."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [one.getsockname()[1] for one in sockets]
