"""A deterministic generation backend: answers as configured and records its requests and their fate."""

import asyncio
from collections.abc import AsyncIterator, Callable

from dspark_core.records import (
    FinishReason,
    GenerateChunk,
    GenerateRequest,
    SpeculationStats,
    TokenLogprobs,
    VerifierDescription,
)
from tests.support.byte_tokenizer import END, VOCAB


class FakeBackend:
    """Tokens are bytes; `answer` gives the text for a request, followed by the end token."""

    def __init__(
        self,
        answer: str | Callable[[GenerateRequest], str] = "Hello, world!",
        *,
        chunk_tokens: int = 3,
        max_context_tokens: int = 200,
    ) -> None:
        self._answer = answer if callable(answer) else lambda _: answer
        self._chunk_tokens = chunk_tokens
        self.max_context_tokens = max_context_tokens
        self.requests: list[GenerateRequest] = []
        self.running = 0
        self.cancelled = 0
        self.describe_error: Exception | None = None
        self.error: Exception | None = None
        self.error_after_chunks = 0
        self.hold_after_chunks: int | None = None
        self.release = asyncio.Event()

    async def describe(self) -> VerifierDescription:
        if self.describe_error is not None:
            raise self.describe_error
        return VerifierDescription(model="m", vocab_size=VOCAB, max_context_tokens=self.max_context_tokens)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateChunk]:
        self.requests.append(request)
        self.running += 1
        try:
            for index, chunk in enumerate(self.chunks(request)):
                if self.error is not None and index == self.error_after_chunks:
                    raise self.error
                if index == self.hold_after_chunks:
                    await self.release.wait()
                yield chunk
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    def chunks(self, request: GenerateRequest) -> list[GenerateChunk]:
        ids = [*self._answer(request).encode(), END]
        reason = FinishReason.STOP
        if request.max_tokens is not None and len(ids) > request.max_tokens:
            ids, reason = ids[: request.max_tokens], FinishReason.LENGTH
        pieces = [ids[i : i + self._chunk_tokens] for i in range(0, len(ids), self._chunk_tokens)]
        return [
            GenerateChunk(
                token_ids=tuple(piece),
                finish_reason=reason if number == len(pieces) else None,
                stats=_stats(number, self._chunk_tokens),
                logprobs=() if request.top_logprobs is None else _logprobs(piece, request.top_logprobs),
            )
            for number, piece in enumerate(pieces, start=1)
        ]


def _logprobs(token_ids: list[int], top: int) -> tuple[TokenLogprobs, ...]:
    """The most likely tokens are the token itself and the ids after it."""
    return tuple(
        TokenLogprobs(-token_id / 100, tuple((token_id + n, -(token_id + n) / 100) for n in range(top)))
        for token_id in token_ids
    )


def _stats(rounds: int, tokens: int) -> SpeculationStats:
    return SpeculationStats(
        rounds=rounds,
        drafted_tokens=rounds * (tokens + 1),
        verified_tokens=rounds * tokens,
        accepted_tokens=rounds * (tokens - 1),
        committed_tokens=rounds * tokens,
        draft_seconds=rounds * 0.001,
        verify_seconds=rounds * 0.002,
    )
