"""A verifier servicer that fails, hangs or floods, depending on the request id."""

import asyncio
from collections.abc import AsyncIterator

import grpc.aio
from dspark_proto.v1 import verifier_pb2, verifier_pb2_grpc

from dspark_core.errors import ContextLengthError, QueueFullError, UnavailableError, UnknownModelError

ERRORS = {
    "context": ContextLengthError("prompt has 9 tokens, the limit is 8", field="prompt_token_ids"),
    "model": UnknownModelError("model 'x' is not served", field="model"),
    "full": QueueFullError("the waiting queue is full (32)", retry_after_seconds=2.5),
    "gone": UnavailableError("nobody is here"),
    "bug": ValueError("/secret/path is broken"),
}


class FaultyVerifier(verifier_pb2_grpc.VerifierServiceServicer):
    def __init__(self) -> None:
        self.describe_error: Exception | None = None
        self.describe_hangs = False
        self.release = asyncio.Event()
        self.running = 0
        self.cancelled = 0

    def register(self, server: grpc.aio.Server) -> str:
        verifier_pb2_grpc.add_VerifierServiceServicer_to_server(self, server)
        return verifier_pb2.DESCRIPTOR.services_by_name["VerifierService"].full_name

    async def Describe(self, request, context) -> verifier_pb2.DescribeVerifierResponse:  # noqa: N802
        if self.describe_error is not None:
            raise self.describe_error
        if self.describe_hangs:
            await asyncio.Event().wait()
        return verifier_pb2.DescribeVerifierResponse(model="m")

    async def Generate(self, request, context) -> AsyncIterator[verifier_pb2.GenerateChunk]:  # noqa: N802
        """One chunk, then by request id: an error of ERRORS, "wait" for `release`, "strange" or "flood"."""
        self.running += 1
        try:
            yield verifier_pb2.GenerateChunk(token_ids=[1])
            if request.request_id in ERRORS:
                raise ERRORS[request.request_id]
            if request.request_id == "wait":
                await self.release.wait()
            if request.request_id == "strange":
                yield verifier_pb2.GenerateChunk(finish_reason=77)
            while request.request_id == "flood":
                yield verifier_pb2.GenerateChunk(token_ids=range(10_000))
            yield verifier_pb2.GenerateChunk(token_ids=[2])
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
