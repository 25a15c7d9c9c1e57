"""Chat completions: from an OpenAI body to an OpenAI answer, whole or in chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator

from services.gateway.answers import AnswerFactory, AnswerHead, collect
from services.gateway.backend import closing
from services.gateway.chunk_template import PLACE, ChunkTemplate
from services.gateway.generation import TextGenerator, TimedDelta
from services.gateway.openai_responses import (
    AnswerMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    SpeculationStatsBody,
    UsageBody,
    reason_of,
)
from services.gateway.openai_schema import ChatCompletionBody
from services.gateway.tiers import Caller


class ChatCompletions:
    body_type = ChatCompletionBody
    id_prefix = "chatcmpl"

    def __init__(self, generator: TextGenerator, answers: AnswerFactory) -> None:
        self._generator = generator
        self._answers = answers

    async def complete(self, body: ChatCompletionBody, request_id: str, caller: Caller) -> ChatCompletion:
        head = self._answers.head(request_id)
        async with closing(self._generator.stream(caller.sends(body.to_request(request_id)))) as deltas:
            text, last = await collect(deltas)
        choice = ChatChoice(
            message=AnswerMessage(content=text), finish_reason=reason_of(last.delta.finish_reason)
        )
        return ChatCompletion(
            **head,
            choices=[choice],
            usage=UsageBody.of(last.delta.usage),
            speculation=SpeculationStatsBody.of(last),
        )

    async def stream(
        self, body: ChatCompletionBody, request_id: str, caller: Caller
    ) -> AsyncIterator[ChatCompletionChunk | str]:
        """Chunks, or their JSON. Nothing is yielded before the first token, so that earlier errors can be
        answered as such."""
        chunks = _Chunks(self._answers.head(request_id), body)
        first = True
        async with closing(self._generator.stream(caller.sends(body.to_request(request_id)))) as deltas:
            async for timed in deltas:
                if first:
                    yield chunks.chunk(ChatDelta(role="assistant", content=""))
                    first = False
                if timed.delta.text:
                    yield chunks.text(timed.delta.text)
                if timed.delta.finish_reason is not None:
                    yield chunks.end(timed)
                    if chunks.include_usage:
                        yield chunks.usage(timed)


class _Chunks:
    def __init__(self, head: AnswerHead, body: ChatCompletionBody) -> None:
        self._head = head
        self.include_usage = bool(body.stream_options and body.stream_options.include_usage)
        self._template = ChunkTemplate(self.chunk(ChatDelta(content=PLACE)))

    def text(self, text: str) -> str:
        return self._template.filled(text)

    def chunk(self, delta: ChatDelta) -> ChatCompletionChunk:
        choice = ChatChunkChoice(index=0, delta=delta, logprobs=None, finish_reason=None)
        return self._answer([choice])

    def end(self, timed: TimedDelta) -> ChatCompletionChunk:
        reason = reason_of(timed.delta.finish_reason)
        choice = ChatChunkChoice(index=0, delta=ChatDelta(), logprobs=None, finish_reason=reason)
        chunk = self._answer([choice])
        chunk.speculation = SpeculationStatsBody.of(timed)
        return chunk

    def usage(self, timed: TimedDelta) -> ChatCompletionChunk:
        chunk = self._answer([])
        chunk.usage = UsageBody.of(timed.delta.usage)
        return chunk

    def _answer(self, choices: list[ChatChunkChoice]) -> ChatCompletionChunk:
        chunk = ChatCompletionChunk(**self._head, object="chat.completion.chunk", choices=choices)
        if self.include_usage:
            chunk.usage = None  # present and null on every chunk but the last, as OpenAI does
        return chunk
