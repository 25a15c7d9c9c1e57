"""What a gateway process runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import AsyncExitStack

from dspark_core.errors import DSparkError
from dspark_core.model_paths import resolve_model_path
from dspark_core.tokenization.loading import load_tokenizer
from services.common.lifecycle import end
from services.common.scheduler_link import link_to_schedulers
from services.common.server import GrpcServer, serve
from services.common.telemetry import Telemetry
from services.gateway.config import GatewayConfig
from services.gateway.gateway import build_gateway
from services.gateway.http.app import create_app
from services.gateway.http.server import HttpServer
from services.gateway.servicer import GatewayServicer
from services.gateway.verifiers.backend import GenerationBackend
from services.gateway.verifiers.routed_backend import RoutedBackend
from services.gateway.verifiers.verifier_pool import GrpcConnection, VerifierPool

_log = logging.getLogger(__name__)

_RETRY_SECONDS = 0.5
_DRAIN_MARGIN_SECONDS = 0.25
_LINGER_SHARE = 0.25
"""Share of the drain time within which load balancers should have noticed that this gateway is ending."""


async def run(environ: Mapping[str, str]) -> None:
    config = GatewayConfig.from_env(environ)
    telemetry = Telemetry.from_env("gateway", environ)
    path = resolve_model_path(config.target_model)
    tokenizer = await asyncio.to_thread(load_tokenizer, path, config.chat_template_kwargs)
    async with AsyncExitStack() as stack:
        scheduler = link_to_schedulers(config.scheduler_address, telemetry, config.tls)
        stack.push_async_callback(scheduler.close)
        pool = VerifierPool(lambda address: GrpcConnection(address, telemetry, config.tls))
        stack.push_async_callback(pool.close)
        backend = RoutedBackend(
            model=config.target_model,
            scheduler=scheduler,
            pool=pool,
            deadline_seconds=config.limits.request_timeout_seconds,
            admission_wait_seconds=config.limits.admission_wait_seconds,
        )
        view = asyncio.create_task(backend.keep_view(), name="replica-view")
        stack.push_async_callback(end, view)
        gateway = build_gateway(config, tokenizer, backend, telemetry)
        gateway.start_tasks(stack)
        server = GrpcServer(config.grpc, [GatewayServicer(gateway).register], telemetry)
        http = HttpServer(
            create_app(gateway, ready=lambda: server.ready),
            gateway.admission,
            host=config.http_host,
            port=config.http_port,
            keep_alive_seconds=config.http_keep_alive_seconds,
        )
        stack.push_async_callback(http.stop)

        async def warm_up() -> None:
            _log.info("HTTP on port %d", await http.start())
            await _first_verifier(backend)

        async def on_drain() -> None:
            # Must end just before the server's own budget does, or the hook would count as failed.
            budget_seconds = max(0.0, config.grpc.drain_seconds - _DRAIN_MARGIN_SECONDS)
            ends = asyncio.get_running_loop().time() + budget_seconds
            await http.linger(budget_seconds * _LINGER_SHARE)
            server.send_away()
            await http.drain(max(0.0, ends - asyncio.get_running_loop().time()))

        await serve(server, warm_up=warm_up, on_drain=on_drain)


async def _first_verifier(backend: GenerationBackend) -> None:
    """Waits for a verifier: ready means that requests can be served, and only verifiers know the context
    limit."""
    warned = False
    while True:
        try:
            description = await backend.describe()
        except DSparkError as error:
            if not warned:
                _log.info("waiting for a verifier: %s", error)
            warned = True
            await asyncio.sleep(_RETRY_SECONDS)
        else:
            _log.info("serving %s, %d tokens of context", description.model, description.max_context_tokens)
            return
