"""Chat completions: from an OpenAI body to an OpenAI answer, whole or in chunks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from services.gateway.answers import AnswerFactory, AnswerHead, Collected, collect
from services.gateway.assembly import TextDelta, Usage
from services.gateway.callers.tiers import Caller
from services.gateway.generation import TimedDelta
from services.gateway.http.streaming import DONE_EVENT
from services.gateway.openai.chunk_template import PLACE, ChunkTemplate
from services.gateway.openai.completion_answers import (
    AnswerMessage,
    CallBody,
    CallDeltaBody,
    CalledFunction,
    CalledFunctionDelta,
    CallingMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    SpeculationStatsBody,
    UsageBody,
    reason_of,
)
from services.gateway.openai.logprobs import ChatLogprobsBody, LogprobsWriter
from services.gateway.openai.schema import ChatCompletionBody
from services.gateway.openai.use_case import UseCase
from services.gateway.tools.tool_stream import CallDelta


class ChatCompletions(UseCase):
    body_type = ChatCompletionBody
    id_prefix = "chatcmpl-"
    stream_end = DONE_EVENT

    async def complete(self, body: ChatCompletionBody, request_id: str, caller: Caller) -> ChatCompletion:
        head = self._answers.head(request_id)
        async with self._deltas(body, request_id, caller) as deltas:
            answers = await collect(deltas)
        return ChatCompletion(
            **head,
            choices=[self._choice(answer, body) for answer in answers],
            usage=UsageBody.of([answer.last.delta.usage for answer in answers], len(answers)),
            speculation=SpeculationStatsBody.of(*(answer.last for answer in answers)),
        )

    def _choice(self, answer: Collected, body: ChatCompletionBody) -> ChatChoice:
        return ChatChoice(
            index=answer.last.choice,
            message=_message(answer, self._answers),
            logprobs=LogprobsWriter(self._tokenizer).chat(answer.logprobs) if body.logprobs else None,
            finish_reason=reason_of(answer.last.delta),
        )

    async def stream(
        self, body: ChatCompletionBody, request_id: str, caller: Caller
    ) -> AsyncIterator[ChatCompletionChunk | str]:
        """Yields chunks, or their JSON. Nothing is yielded before the first token, so that earlier errors can
        still get an HTTP status."""
        head = self._answers.head(request_id)
        call_id = self._answers.call_id
        choices: dict[int, _Chunks] = {}
        usages: dict[int, Usage] = {}
        async with self._deltas(body, request_id, caller) as deltas:
            async for timed in deltas:
                chunks = choices.get(timed.choice)
                if chunks is None:
                    chunks = _Chunks(head, body, LogprobsWriter(self._tokenizer), timed.choice)
                    choices[timed.choice] = chunks
                    yield chunks.chunk(ChatDelta(role="assistant", content=""))
                for chunk in chunks.texts(timed.delta):
                    yield chunk
                for call in timed.delta.calls:
                    yield chunks.call(call, call_id)
                if timed.delta.finish_reason is not None:
                    usages[timed.choice] = timed.delta.usage
                    yield chunks.end(timed)
        if body.includes_usage:
            yield choices[0].usage([usages[index] for index in sorted(usages)])


def _message(answer: Collected, answers: AnswerFactory) -> AnswerMessage | CallingMessage:
    thought = answer.reasoning or None
    if not answer.calls:
        return AnswerMessage(content=answer.text, reasoning_content=thought, reasoning=thought)
    names = {call.index: call.name for call in answer.calls if call.name is not None}
    calls = [
        CallBody(
            id=answers.call_id(),
            function=CalledFunction(
                name=name, arguments="".join(call.arguments for call in answer.calls if call.index == index)
            ),
        )
        for index, name in names.items()
    ]
    return CallingMessage(
        content=answer.text or None, reasoning_content=thought, reasoning=thought, tool_calls=calls
    )


def _thinking(text: str) -> ChatDelta:
    return ChatDelta(reasoning_content=text, reasoning=text)


class _Chunks:
    """Makes the chunks of one choice."""

    def __init__(
        self, head: AnswerHead, body: ChatCompletionBody, logprobs: LogprobsWriter, index: int
    ) -> None:
        self._head = head
        self._logprobs = logprobs
        self._index = index
        self._include_usage = body.includes_usage
        self._template = ChunkTemplate(self.chunk(ChatDelta(content=PLACE)))
        self._thought = ChunkTemplate(self.chunk(_thinking(PLACE)))

    def texts(self, delta: TextDelta) -> Iterator[ChatCompletionChunk | str]:
        """A thought has chunks of its own: many clients read no content from a chunk that has one."""
        logprobs = self._logprobs.chat(delta.logprobs) if delta.logprobs else None
        if delta.reasoning:
            if logprobs is None or delta.text:
                yield self._thought.filled(delta.reasoning)
            else:
                yield self.chunk(_thinking(delta.reasoning), logprobs)
                return
        if logprobs is not None:
            yield self.chunk(ChatDelta(content=delta.text), logprobs)
        elif delta.text:
            yield self._template.filled(delta.text)

    def chunk(self, delta: ChatDelta, logprobs: ChatLogprobsBody | None = None) -> ChatCompletionChunk:
        choice = ChatChunkChoice(index=self._index, delta=delta, logprobs=logprobs, finish_reason=None)
        return self._answer([choice])

    def call(self, call: CallDelta, new_id: Callable[[], str]) -> ChatCompletionChunk:
        if call.name is None:
            function = CalledFunctionDelta(arguments=call.arguments)
            body = CallDeltaBody(index=call.index, function=function)
        else:
            function = CalledFunctionDelta(name=call.name, arguments="")
            body = CallDeltaBody(index=call.index, id=new_id(), type="function", function=function)
        return self.chunk(ChatDelta(tool_calls=[body]))

    def end(self, timed: TimedDelta) -> ChatCompletionChunk:
        reason = reason_of(timed.delta)
        choice = ChatChunkChoice(index=self._index, delta=ChatDelta(), logprobs=None, finish_reason=reason)
        chunk = self._answer([choice])
        chunk.speculation = SpeculationStatsBody.of(timed)
        return chunk

    def usage(self, usages: Sequence[Usage]) -> ChatCompletionChunk:
        """Sums up all choices."""
        chunk = self._answer([])
        chunk.usage = UsageBody.of(usages, len(usages))
        return chunk

    def _answer(self, choices: list[ChatChunkChoice]) -> ChatCompletionChunk:
        chunk = ChatCompletionChunk(**self._head, object="chat.completion.chunk", choices=choices)
        if self._include_usage:
            chunk.usage = None  # present and null on every chunk but the last, as OpenAI does
        return chunk
