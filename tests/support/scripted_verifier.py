"""A verifier on real gRPC that generates one fixed text, two bytes a round, continuing from its prompt."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import grpc.aio
from dspark_proto.v1 import common_pb2, verifier_pb2, verifier_pb2_grpc

from dspark_core.records import Replica, Role
from services.common.options import ServerOptions
from services.common.server import GrpcServer
from services.common.telemetry import Telemetry
from tests.support.byte_tokenizer import END, VOCAB

MARKER = tuple(b"assistant\n")
"""Ends every chat prompt; tokens after it were committed earlier."""


class ScriptedVerifier(verifier_pb2_grpc.VerifierServiceServicer):
    def __init__(self, name: str, model: str, text: str) -> None:
        self._name = name
        self._model = model
        self._tokens = [*text.encode(), END]
        self._server = GrpcServer(
            ServerOptions(port=0, host="127.0.0.1"), [self._register], Telemetry(service=name)
        )
        self.prompts: list[tuple[int, ...]] = []
        self.traces: list[str] = []
        self.running = 0
        self.hold_after_rounds: int | None = None
        self.release = asyncio.Event()

    async def start(self) -> None:
        await self._server.start()
        await self._server.mark_ready()

    async def kill(self) -> None:
        await self._server.stop()

    @property
    def replica(self) -> Replica:
        return Replica(
            replica_id=self._name,
            role=Role.VERIFIER,
            address=f"127.0.0.1:{self._server.port}",
            model=self._model,
        )

    async def Describe(self, request, context) -> verifier_pb2.DescribeVerifierResponse:  # noqa: N802
        return verifier_pb2.DescribeVerifierResponse(
            model=self._model, vocab_size=VOCAB, max_context_tokens=500
        )

    async def Generate(self, request, context) -> AsyncIterator[verifier_pb2.GenerateChunk]:  # noqa: N802
        prompt = tuple(request.prompt_token_ids)
        self.prompts.append(prompt)
        metadata = dict(context.invocation_metadata())
        self.traces.append(metadata.get("traceparent", ""))
        rest = self._tokens[_committed(prompt) :]
        with self._counted():
            for rounds, start in enumerate(range(0, len(rest), 2)):
                if rounds == self.hold_after_rounds:
                    await self.release.wait()
                tokens = rest[start : start + 2]
                chunk = verifier_pb2.GenerateChunk(token_ids=tokens)
                chunk.stats.rounds = rounds + 1
                chunk.stats.committed_tokens = 2 * (rounds + 1)
                if tokens[-1] == END:
                    chunk.finish_reason = common_pb2.FINISH_REASON_STOP
                yield chunk

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    def _register(self, server: grpc.aio.Server) -> None:
        verifier_pb2_grpc.add_VerifierServiceServicer_to_server(self, server)


def _committed(prompt: tuple[int, ...]) -> int:
    """Number of tokens after the marker."""
    ends = (end for end in range(len(prompt), 0, -1) if prompt[:end][-len(MARKER) :] == MARKER)
    return len(prompt) - next(ends, len(prompt))
