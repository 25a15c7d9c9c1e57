"""gRPC face of the verifier."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import grpc.aio
from dspark_proto.v1 import verifier_pb2, verifier_pb2_grpc

from dspark_core.engine.verifier import Verifier
from dspark_core.records import GenerateChunk, GenerateRequest, VerifierDescription
from services.common import convert


class VerifierServicer(verifier_pb2_grpc.VerifierServiceServicer):
    def __init__(
        self,
        verifier: Verifier,
        description: VerifierDescription,
        *,
        on_arrival: Callable[[str], None] = lambda request_id: None,
    ) -> None:
        """`on_arrival` is told the id of every request."""
        self._verifier = verifier
        self._description = description
        self._on_arrival = on_arrival

    def register(self, server: grpc.aio.Server) -> None:
        verifier_pb2_grpc.add_VerifierServiceServicer_to_server(self, server)

    async def Describe(
        self, request: verifier_pb2.DescribeVerifierRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> verifier_pb2.DescribeVerifierResponse:
        return convert.verifier_description_to_proto(self._description)

    async def Generate(
        self, request: verifier_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[verifier_pb2.GenerateChunk]:
        self._on_arrival(request.request_id)
        # A cancelled call closes this generator, which frees the request's pages.
        async with aclosing(self._verifier.generate(convert.generate_request_from_proto(request))) as chunks:
            async for chunk in chunks:
                yield convert.generate_chunk_to_proto(chunk)


class LocalVerifier:
    """`VerifierApi` without a network, for the embedded default."""

    def __init__(self, verifier: Verifier, description: VerifierDescription) -> None:
        self._verifier = verifier
        self._description = description

    async def describe(self) -> VerifierDescription:
        return self._description

    def generate(
        self, request: GenerateRequest, *, deadline_seconds: float
    ) -> AsyncGenerator[GenerateChunk, None]:
        return self._verifier.generate(request)
