"""Serves the verifier to callers in its own process and over gRPC."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractContextManager, aclosing, nullcontext
from dataclasses import replace
from typing import Any

import grpc.aio
from dspark_proto.v1 import verifier_pb2, verifier_pb2_grpc
from opentelemetry.trace import NoOpTracer, Tracer

from dspark_core.engine.rounds.verifier import Verifier
from dspark_core.errors import UnavailableError
from dspark_core.records import GenerateChunk, GenerateRequest, VerifierDescription
from services.common import convert
from services.verifier.round_spans import with_round_spans


class LocalVerifier:
    """A `VerifierApi` without a network."""

    def __init__(
        self,
        verifier: Verifier,
        description: VerifierDescription,
        *,
        serving: Callable[[GenerateRequest], AbstractContextManager[None]] = lambda request: nullcontext(),
        tracer: Tracer | None = None,
    ) -> None:
        """`serving` is entered around every request; `tracer` receives spans of its rounds."""
        self._verifier = verifier
        self._description = description
        self._serving = serving
        self._tracer = tracer or NoOpTracer()

    async def describe(self) -> VerifierDescription:
        return self._description

    async def generate(
        self, request: GenerateRequest, *, deadline_seconds: float
    ) -> AsyncGenerator[GenerateChunk, None]:
        """Raises UnavailableError for a request that other weights began."""
        weights = self._description.weights
        if request.weights and request.weights != weights:
            raise UnavailableError(f"this verifier serves weights {weights!r}, not {request.weights!r}")
        with self._serving(request):
            async with (
                aclosing(self._verifier.generate(request)) as chunks,
                aclosing(with_round_spans(chunks, self._tracer)) as traced,
            ):
                async for chunk in traced:
                    yield replace(chunk, weights=weights) if weights else chunk
                    weights = ""  # told once


class VerifierServicer(verifier_pb2_grpc.VerifierServiceServicer):
    """Serves a `LocalVerifier` over gRPC."""

    def __init__(self, verifier: LocalVerifier) -> None:
        self._verifier = verifier

    def register(self, server: grpc.aio.Server) -> str:
        verifier_pb2_grpc.add_VerifierServiceServicer_to_server(self, server)
        return verifier_pb2.DESCRIPTOR.services_by_name["VerifierService"].full_name

    async def Describe(
        self, request: verifier_pb2.DescribeVerifierRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> verifier_pb2.DescribeVerifierResponse:
        return convert.verifier_description_to_proto(await self._verifier.describe())

    async def Generate(
        self, request: verifier_pb2.GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[verifier_pb2.GenerateChunk]:
        asked = convert.generate_request_from_proto(request)
        # At its deadline gRPC cancels the call, which closes this generator and frees the request's pages.
        async with aclosing(self._verifier.generate(asked, deadline_seconds=math.inf)) as chunks:
            async for chunk in chunks:
                yield convert.generate_chunk_to_proto(chunk)
