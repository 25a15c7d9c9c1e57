"""A verifier tells which weights it serves, and does not continue what others began."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace

import pytest

from dspark_core.engine.rounds.verifier import Verifier
from dspark_core.errors import UnavailableError
from dspark_core.records import GenerateChunk, GenerateRequest, VerifierDescription
from services.common.channels import open_channel
from services.common.clients import VerifierClient
from services.common.options import ServerOptions
from services.common.server import GrpcServer
from services.common.telemetry import Telemetry
from services.verifier.servicer import LocalVerifier, VerifierServicer
from tests.unit.engine.tiny import make_loop, prompts, request

ASKED = request("r", prompts(1, seed=3)[0], max_tokens=9)


@pytest.fixture
async def client() -> AsyncIterator[VerifierClient]:
    verifier = Verifier(make_loop())
    described = VerifierDescription(model="tiny", vocab_size=9, max_context_tokens=200, weights="ours")
    servicer = VerifierServicer(LocalVerifier(verifier, described))
    async with AsyncExitStack() as stack:
        verifier.start()
        stack.callback(verifier.stop)
        options = ServerOptions(port=0, host="127.0.0.1")
        server = GrpcServer(options, [servicer.register], Telemetry(service="verifier"))
        port = await server.start()
        stack.push_async_callback(server.stop)
        yield VerifierClient(await stack.enter_async_context(open_channel(f"127.0.0.1:{port}")))


async def answer(client: VerifierClient, asked: GenerateRequest) -> list[GenerateChunk]:
    async with aclosing(client.generate(asked, deadline_seconds=60)) as chunks:
        return [chunk async for chunk in chunks]


async def test_the_first_chunk_tells_the_weights(client: VerifierClient) -> None:
    chunks = await answer(client, ASKED)
    assert [chunk.weights for chunk in chunks] == ["ours"] + [""] * (len(chunks) - 1)
    assert (await client.describe()).weights == "ours"


async def test_what_other_weights_began_is_refused(client: VerifierClient) -> None:
    assert await answer(client, replace(ASKED, weights="ours"))
    with pytest.raises(UnavailableError, match="serves weights 'ours', not 'theirs'"):
        await answer(client, replace(ASKED, weights="theirs"))
