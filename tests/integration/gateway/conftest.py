"""A whole gateway on loopback ports, over a fake backend."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

import grpc.aio
import httpx
import pytest
from dspark_proto.v1 import gateway_pb2_grpc
from openai import AsyncOpenAI

from services.common.server import GrpcServer
from services.common.telemetry import Telemetry
from services.gateway.config import GatewayConfig
from services.gateway.gateway import Gateway, build_gateway
from services.gateway.http.app import create_app
from services.gateway.http.server import HttpServer
from services.gateway.servicer import GatewayServicer
from tests.support.byte_tokenizer import TEMPLATE, byte_tokenizer
from tests.support.fake_generation import FakeBackend

MODEL = "byte-model"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningGateway:
    gateway: Gateway
    http: HttpServer
    grpc_server: GrpcServer
    client: httpx.AsyncClient
    openai: AsyncOpenAI
    stub: gateway_pb2_grpc.GatewayServiceStub

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.port}"

    async def metric(self, line_start: str) -> str:
        text = (await self.client.get("/metrics")).text
        return next(line for line in text.splitlines() if line.startswith(line_start))


Serve = Callable[..., Awaitable[RunningGateway]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    async with AsyncExitStack() as stack:

        async def start(
            backend: FakeBackend,
            *,
            telemetry: Telemetry | None = None,
            key: str = "unused",
            chat_template: str = TEMPLATE,
            **options: Any,
        ) -> RunningGateway:
            telemetry = telemetry or Telemetry(service="gateway")
            config = GatewayConfig(target_model=f"/models/{MODEL}", **options)
            tokenizer = byte_tokenizer(chat_template=chat_template)
            gateway = build_gateway(config, tokenizer, backend, telemetry)
            bound = replace(
                config.grpc, port=0, host="127.0.0.1", max_message_bytes=config.limits.max_body_bytes
            )
            grpc_server = GrpcServer(bound, [GatewayServicer(gateway).register], telemetry)
            grpc_port = await grpc_server.start()
            stack.push_async_callback(grpc_server.stop)
            await grpc_server.mark_ready()
            app = create_app(gateway, ready=lambda: grpc_server.ready)
            idle = config.http_keep_alive_seconds
            http = HttpServer(app, gateway.admission, host="127.0.0.1", port=0, keep_alive_seconds=idle)
            port = await http.start()
            stack.push_async_callback(http.stop)
            base = f"http://127.0.0.1:{port}"
            # Plain HTTP: without verify=False every client would load all root certificates.
            client = httpx.AsyncClient(base_url=base, timeout=20, verify=False)
            await stack.enter_async_context(client)
            openai = AsyncOpenAI(
                base_url=f"{base}/v1",
                api_key=key,
                max_retries=0,
                http_client=httpx.AsyncClient(timeout=20, verify=False),
            )
            await stack.enter_async_context(openai)
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}")
            await stack.enter_async_context(channel)
            return RunningGateway(
                gateway=gateway,
                http=http,
                grpc_server=grpc_server,
                client=client,
                openai=openai,
                stub=gateway_pb2_grpc.GatewayServiceStub(channel),
            )

        yield start
