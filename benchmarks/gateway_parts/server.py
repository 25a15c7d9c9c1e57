"""The gateway as `dspark up` builds it, in front of a verifier that yields tokens without delay."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection as Pipe

from dspark_core.model_paths import DEFAULT_MODEL, resolve_model_path
from dspark_core.records import (
    FinishReason,
    GenerateChunk,
    GenerateRequest,
    Replica,
    Role,
    SpeculationStats,
    VerifierDescription,
)
from dspark_core.tokenization.loading import load_tokenizer
from services.common.registration import RegistrationLoop
from services.common.telemetry import Telemetry
from services.gateway.config import GatewayConfig
from services.gateway.gateway import build_gateway
from services.gateway.http.app import create_app
from services.gateway.http.server import HttpServer
from services.gateway.verifiers.routed_backend import RoutedBackend
from services.gateway.verifiers.verifier_pool import LocalConnection, VerifierPool
from services.scheduler.scheduler import Scheduler

REPLICA = Replica(replica_id="scripted", role=Role.VERIFIER, address="scripted", model=DEFAULT_MODEL)
TEXT = "A gateway takes a token, finds out which letters it stands for and sends them on to whoever asked. "


class ScriptedVerifier:
    """Yields one token per stream each time the event loop schedules it."""

    def __init__(self, token_ids: Sequence[int], vocab_size: int) -> None:
        self._token_ids = token_ids
        self._vocab_size = vocab_size

    async def describe(self) -> VerifierDescription:
        return VerifierDescription(model=DEFAULT_MODEL, vocab_size=self._vocab_size, max_context_tokens=8192)

    async def generate(
        self, request: GenerateRequest, *, deadline_seconds: float
    ) -> AsyncGenerator[GenerateChunk, None]:
        count = request.max_tokens or 1
        for number in range(1, count + 1):
            await asyncio.sleep(0)
            yield GenerateChunk(
                token_ids=(self._token_ids[number % len(self._token_ids)],),
                finish_reason=FinishReason.LENGTH if number == count else None,
                stats=SpeculationStats(rounds=number, committed_tokens=number, verify_seconds=0.01 * number),
            )


def serve(pipe: Pipe) -> None:
    """Send the port, then answer each "usage" message with the CPU time used, until another message."""
    asyncio.run(_serve(pipe))


async def _serve(pipe: Pipe) -> None:
    tokenizer = load_tokenizer(resolve_model_path(DEFAULT_MODEL))
    verifier = ScriptedVerifier(tokenizer.encode(TEXT), tokenizer.vocab_size)
    async with AsyncExitStack() as closing:
        scheduler = Scheduler()
        await scheduler.start()
        closing.push_async_callback(scheduler.close)
        registration = RegistrationLoop(scheduler, lambda: REPLICA)
        registration.start()
        closing.push_async_callback(registration.stop)
        await registration.wait_registered()
        pool = VerifierPool(lambda address: LocalConnection(verifier))
        closing.push_async_callback(pool.close)
        config = GatewayConfig(target_model=DEFAULT_MODEL)
        backend = RoutedBackend(
            model=DEFAULT_MODEL,
            scheduler=scheduler,
            pool=pool,
            deadline_seconds=config.limits.request_timeout_seconds,
        )
        gateway = build_gateway(config, tokenizer, backend, Telemetry(service="gateway"))
        http = HttpServer(
            create_app(gateway, ready=lambda: True),
            gateway.admission,
            host="127.0.0.1",
            port=0,
            keep_alive_seconds=config.http_keep_alive_seconds,
        )
        pipe.send(await http.start())
        closing.push_async_callback(http.stop)
        while await asyncio.to_thread(pipe.recv) == "usage":
            pipe.send(time.process_time())
