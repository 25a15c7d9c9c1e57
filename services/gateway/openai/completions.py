"""Plain completions: from an OpenAI body to an OpenAI answer, whole or in chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator

from services.gateway.answers import AnswerHead, Collected, collect
from services.gateway.assembly import Usage
from services.gateway.callers.tiers import Caller
from services.gateway.generation import TimedDelta
from services.gateway.http.streaming import DONE_EVENT
from services.gateway.openai.chunk_template import PLACE, ChunkTemplate
from services.gateway.openai.completion_answers import (
    Completion,
    CompletionChoice,
    CompletionChunk,
    SpeculationStatsBody,
    UsageBody,
    reason_of,
)
from services.gateway.openai.logprobs import CompletionLogprobsBody, LogprobsWriter
from services.gateway.openai.schema import CompletionBody
from services.gateway.openai.use_case import UseCase


class Completions(UseCase):
    body_type = CompletionBody
    id_prefix = "cmpl-"
    stream_end = DONE_EVENT

    async def complete(self, body: CompletionBody, request_id: str, caller: Caller) -> Completion:
        head = self._answers.head(request_id)
        async with self._deltas(body, request_id, caller) as deltas:
            answers = await collect(deltas)
        return Completion(
            **head,
            object="text_completion",
            choices=[self._whole(answer, body) for answer in answers],
            usage=UsageBody.of([answer.last.delta.usage for answer in answers], body.choices),
            speculation=SpeculationStatsBody.of(*(answer.last for answer in answers)),
        )

    def _whole(self, answer: Collected, body: CompletionBody) -> CompletionChoice:
        logprobs = None
        if body.logprobs is not None:
            logprobs = LogprobsWriter(self._tokenizer).completion(answer.logprobs)
        return _choice(answer.text, answer.last, logprobs)

    async def stream(
        self, body: CompletionBody, request_id: str, caller: Caller
    ) -> AsyncIterator[CompletionChunk | str]:
        """Yields chunks, or their JSON. Nothing is yielded before the first token, so that earlier errors can
        still get an HTTP status."""
        head = self._answers.head(request_id)
        choices: dict[int, _Chunks] = {}
        usages: dict[int, Usage] = {}
        async with self._deltas(body, request_id, caller) as deltas:
            async for timed in deltas:
                chunks = choices.get(timed.choice)
                if chunks is None:
                    chunks = _Chunks(head, body, LogprobsWriter(self._tokenizer), timed.choice)
                    choices[timed.choice] = chunks
                chunk = chunks.of(timed)
                if chunk is not None:
                    yield chunk
                if timed.delta.finish_reason is not None:
                    usages[timed.choice] = timed.delta.usage
        if body.includes_usage:
            usage = UsageBody.of([usages[index] for index in sorted(usages)], body.choices)
            yield CompletionChunk(**head, object="text_completion", choices=[], usage=usage)


class _Chunks:
    """Makes the chunks of one choice."""

    def __init__(self, head: AnswerHead, body: CompletionBody, logprobs: LogprobsWriter, index: int) -> None:
        self._head = head
        self._logprobs = logprobs
        self._include_usage = body.includes_usage
        empty = CompletionChoice(index=index, text=PLACE, logprobs=None, finish_reason=None)
        self._template = ChunkTemplate(self._chunk(empty))

    def of(self, timed: TimedDelta) -> CompletionChunk | str | None:
        """None if there is nothing to send."""
        delta = timed.delta
        logprobs = self._logprobs.completion(delta.logprobs) if delta.logprobs else None
        if delta.finish_reason is not None:
            chunk = self._chunk(_choice(delta.text, timed, logprobs))
            chunk.speculation = SpeculationStatsBody.of(timed)
            return chunk
        if logprobs is not None:
            return self._chunk(_choice(delta.text, timed, logprobs))
        return self._template.filled(delta.text) if delta.text else None

    def _chunk(self, choice: CompletionChoice) -> CompletionChunk:
        chunk = CompletionChunk(**self._head, object="text_completion", choices=[choice])
        if self._include_usage:
            chunk.usage = None  # present and null on every chunk but the last, as OpenAI does
        return chunk


def _choice(text: str, timed: TimedDelta, logprobs: CompletionLogprobsBody | None) -> CompletionChoice:
    reason = reason_of(timed.delta)
    return CompletionChoice(index=timed.choice, text=text, logprobs=logprobs, finish_reason=reason)
