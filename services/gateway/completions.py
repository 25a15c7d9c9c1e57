"""Plain completions: from an OpenAI body to an OpenAI answer, whole or in chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator

from dspark_core.tokenization.tokenizer import Tokenizer
from services.gateway.answers import AnswerFactory, collect
from services.gateway.backend import closing
from services.gateway.chunk_template import PLACE, ChunkTemplate
from services.gateway.generation import TextGenerator, TimedDelta
from services.gateway.openai_logprobs import CompletionLogprobsBody, LogprobsWriter
from services.gateway.openai_responses import (
    Completion,
    CompletionChoice,
    CompletionChunk,
    SpeculationStatsBody,
    UsageBody,
    reason_of,
)
from services.gateway.openai_schema import CompletionBody
from services.gateway.tiers import Caller


class Completions:
    body_type = CompletionBody
    id_prefix = "cmpl"

    def __init__(self, generator: TextGenerator, answers: AnswerFactory, tokenizer: Tokenizer) -> None:
        self._generator = generator
        self._answers = answers
        self._tokenizer = tokenizer

    async def complete(self, body: CompletionBody, request_id: str, caller: Caller) -> Completion:
        head = self._answers.head(request_id)
        async with closing(self._generator.stream(caller.sends(body.to_request(request_id)))) as deltas:
            answer = await collect(deltas)
        last = answer.last
        logprobs = None
        if body.logprobs is not None:
            logprobs = LogprobsWriter(self._tokenizer).completion(answer.logprobs)
        return Completion(
            **head,
            object="text_completion",
            choices=[_choice(answer.text, last, logprobs)],
            usage=UsageBody.of(last.delta.usage),
            speculation=SpeculationStatsBody.of(last),
        )

    async def stream(
        self, body: CompletionBody, request_id: str, caller: Caller
    ) -> AsyncIterator[CompletionChunk | str]:
        """Chunks, or their JSON. Nothing is yielded before the first token, so that earlier errors can be
        answered as such."""
        head = self._answers.head(request_id)
        include_usage = bool(body.stream_options and body.stream_options.include_usage)

        def chunk_of(choice: CompletionChoice) -> CompletionChunk:
            chunk = CompletionChunk(**head, object="text_completion", choices=[choice])
            if include_usage:
                chunk.usage = None  # present and null on every chunk but the last, as OpenAI does
            return chunk

        writer = LogprobsWriter(self._tokenizer)
        template = ChunkTemplate(
            chunk_of(CompletionChoice(index=0, text=PLACE, logprobs=None, finish_reason=None))
        )
        async with closing(self._generator.stream(caller.sends(body.to_request(request_id)))) as deltas:
            async for timed in deltas:
                delta = timed.delta
                logprobs = writer.completion(delta.logprobs) if delta.logprobs else None
                if delta.finish_reason is None:
                    if logprobs is not None:
                        yield chunk_of(_choice(delta.text, timed, logprobs))
                    elif delta.text:
                        yield template.filled(delta.text)
                    continue
                chunk = chunk_of(_choice(delta.text, timed, logprobs))
                chunk.speculation = SpeculationStatsBody.of(timed)
                yield chunk
                if include_usage:
                    usage = UsageBody.of(timed.delta.usage)
                    yield CompletionChunk(**head, object="text_completion", choices=[], usage=usage)


def _choice(text: str, timed: TimedDelta, logprobs: CompletionLogprobsBody | None) -> CompletionChoice:
    reason = reason_of(timed.delta.finish_reason)
    return CompletionChoice(index=0, text=text, logprobs=logprobs, finish_reason=reason)
