"""The routed backend over real gRPC inside one process: traces reach the verifier."""

from collections.abc import AsyncIterator

import pytest
from opentelemetry.sdk.trace import TracerProvider

from services.common.telemetry import Telemetry
from services.gateway.verifiers.routed_backend import RoutedBackend
from services.gateway.verifiers.verifier_pool import GrpcConnection, VerifierPool
from services.scheduler.scheduler import Scheduler
from tests.integration.gateway.conftest import MODEL, Serve
from tests.support.scripted_verifier import ScriptedVerifier

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
async def verifier() -> AsyncIterator[ScriptedVerifier]:
    verifier = ScriptedVerifier("v", "m", "hello")
    await verifier.start()
    yield verifier
    await verifier.kill()


@pytest.mark.parametrize("stream", [False, True])
async def test_the_callers_trace_reaches_the_verifier(serve: Serve, verifier, stream) -> None:
    telemetry = Telemetry(service="gateway", provider=TracerProvider(shutdown_on_exit=False))
    scheduler = Scheduler()
    await scheduler.register(verifier.replica)
    pool = VerifierPool(lambda address: GrpcConnection(address, telemetry))
    backend = RoutedBackend(model="m", scheduler=scheduler, pool=pool)
    running = await serve(backend, telemetry=telemetry)
    response = await running.client.post(
        "/v1/chat/completions",
        json={"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": stream},
        headers={"traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01"},
    )
    assert response.status_code == 200
    assert "lo" in response.text
    assert [trace.split("-")[1] for trace in verifier.traces] == [TRACE_ID]
    await pool.close()
    await scheduler.close()
