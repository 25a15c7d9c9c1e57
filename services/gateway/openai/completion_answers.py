"""Answers of OpenAI's completion APIs, and our `speculation` extension."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel

from dspark_core.records import FinishReason, SpeculationStats
from services.gateway.assembly import TextDelta, Usage
from services.gateway.generation import TimedDelta
from services.gateway.openai.logprobs import ChatLogprobsBody, CompletionLogprobsBody


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int


class UsageBody(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails

    @classmethod
    def of(cls, choices: Sequence[Usage], per_prompt: int) -> UsageBody:
        """choices: in order, `per_prompt` of them for each prompt. A prompt counts once."""
        firsts = choices[::per_prompt]
        prompt_tokens = sum(usage.prompt_tokens for usage in firsts)
        completion_tokens = sum(usage.completion_tokens for usage in choices)
        cached_tokens = sum(usage.cached_prompt_tokens for usage in firsts)
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
            completion_tokens_details=CompletionTokensDetails(
                reasoning_tokens=sum(usage.reasoning_tokens for usage in choices)
            ),
        )


class SpeculationStatsBody(BaseModel):
    """What speculation did for one request; the fields are those of the `SpeculationStats` message."""

    rounds: int
    drafted_tokens: int
    verified_tokens: int
    accepted_tokens: int
    lookup_accepted_tokens: int
    committed_tokens: int
    accepted_length: float
    """Mean tokens committed per round, including the bonus token."""
    acceptance_rate: float
    draft_seconds: float
    verify_seconds: float
    tokens_per_second: float
    """Completion tokens divided by the time since the request went to a verifier, including prefill."""
    decode_tokens_per_second: float
    """Tokens after those of the first round, divided by their time: the rate that a speed floor applies to.
    The slowest choice's."""
    min_tokens_per_second: float | None
    """The speed floor, promised or wished for; null: none."""

    @classmethod
    def of(cls, *choices: TimedDelta) -> SpeculationStatsBody | None:
        """Combines one or more choices. None if the backend sent no statistics."""
        known = [timed.delta.stats for timed in choices if timed.delta.stats is not None]
        if not known:
            return None
        stats = functools.reduce(SpeculationStats.plus, known)
        tokens = sum(timed.delta.usage.completion_tokens for timed in choices)
        seconds = max(timed.seconds for timed in choices)
        return cls(
            rounds=stats.rounds,
            drafted_tokens=stats.drafted_tokens,
            verified_tokens=stats.verified_tokens,
            accepted_tokens=stats.accepted_tokens,
            lookup_accepted_tokens=stats.lookup_accepted_tokens,
            committed_tokens=stats.committed_tokens,
            accepted_length=round(stats.accepted_length, 4),
            acceptance_rate=round(stats.acceptance_rate, 4),
            draft_seconds=round(stats.draft_seconds, 6),
            verify_seconds=round(stats.verify_seconds, 6),
            tokens_per_second=round(tokens / seconds, 2) if seconds > 0 else 0.0,
            decode_tokens_per_second=round(min(timed.decode_tokens_per_second for timed in choices), 2),
            min_tokens_per_second=choices[0].min_tokens_per_second,
        )


Reason = Literal["stop", "length", "tool_calls"]


def reason_of(delta: TextDelta) -> Reason | None:
    match delta.finish_reason:
        case FinishReason.STOP:
            return "tool_calls" if delta.called else "stop"
        case FinishReason.LENGTH:
            return "length"
    return None


class _Answer(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str


class _WholeAnswer(_Answer):
    usage: UsageBody
    speculation: SpeculationStatsBody | None


class _StreamedAnswer(_Answer):
    """Unset fields are left out: `usage` is present only if requested."""

    usage: UsageBody | None = None
    speculation: SpeculationStatsBody | None = None
    """On the chunk with the finish reason."""


class _Message(BaseModel):
    """OpenAI's own API has no place for a thought. Clients of other engines look for one of two names."""

    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class AnswerMessage(_Message):
    content: str


class CalledFunction(BaseModel):
    name: str
    arguments: str


class CallBody(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class CallingMessage(_Message):
    content: str | None
    tool_calls: list[CallBody]


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage | CallingMessage
    logprobs: ChatLogprobsBody | None = None
    finish_reason: Reason | None


class ChatCompletion(_WholeAnswer):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class CalledFunctionDelta(BaseModel):
    name: str | None = None
    arguments: str


class CallDeltaBody(BaseModel):
    """The first one of a call has all fields, and no arguments yet."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunctionDelta


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[CallDeltaBody] | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobsBody | None
    finish_reason: Reason | None


class ChatCompletionChunk(_StreamedAnswer):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobsBody | None
    finish_reason: Reason | None


class Completion(_WholeAnswer):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class CompletionChunk(_StreamedAnswer):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ModelBody(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "dspark"
    max_model_len: int | None = None
    """Limit on prompt and answer together, in tokens; None: not known before a verifier is reached."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelBody]
