"""Answers of OpenAI's Responses API: the response, and the events of a streamed one."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from services.gateway.answers import AnswerHead
from services.gateway.assembly import Usage
from services.gateway.http.errors import ErrorAnswer
from services.gateway.openai.completion_answers import SpeculationStatsBody
from services.gateway.openai.logprobs import TokenLogprobBody
from services.gateway.openai.responses_schema import ResponsesBody
from services.gateway.openai.tool_fields import FlatToolBody, FlatToolChoiceBody

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputTextBody(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[None] = []
    logprobs: list[TokenLogprobBody] = []
    """Present if requested."""


class MessageBody(BaseModel):
    id: str
    type: Literal["message"] = "message"
    status: ItemStatus
    role: Literal["assistant"] = "assistant"
    content: list[OutputTextBody]


class CallBody(BaseModel):
    id: str
    type: Literal["function_call"] = "function_call"
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


class ReasoningTextBody(BaseModel):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class ReasoningBody(BaseModel):
    id: str
    type: Literal["reasoning"] = "reasoning"
    status: ItemStatus
    summary: list[None] = []
    """The thought itself is the content."""
    content: list[ReasoningTextBody]
    encrypted_content: None = None


ItemBody = MessageBody | CallBody | ReasoningBody
PartBody = OutputTextBody | ReasoningTextBody


class _InputDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int = 0
    """Cache writes are not billed here."""


class _OutputDetails(BaseModel):
    reasoning_tokens: int


class UsageBody(BaseModel):
    input_tokens: int
    input_tokens_details: _InputDetails
    output_tokens: int
    output_tokens_details: _OutputDetails
    total_tokens: int

    @classmethod
    def of(cls, usage: Usage) -> UsageBody:
        return cls(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=_InputDetails(cached_tokens=usage.cached_prompt_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=_OutputDetails(reasoning_tokens=usage.reasoning_tokens),
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
        )


class _ErrorBody(BaseModel):
    code: Literal["server_error"] = "server_error"
    """Clients accept only a closed set of codes; the preceding `error` event has our own."""
    message: str


class _IncompleteBody(BaseModel):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class _EffortBody(BaseModel):
    effort: None = None
    summary: None = None


class ResponseBody(BaseModel):
    """Sampling fields that the request leaves to the model's defaults are null."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    error: _ErrorBody | None = None
    incomplete_details: _IncompleteBody | None = None
    model: str
    system_fingerprint: str
    output: list[ItemBody] = []
    usage: UsageBody | None = None
    speculation: SpeculationStatsBody | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[FlatToolBody]
    top_logprobs: int
    top_p: float | None
    background: Literal[False] = False
    previous_response_id: None = None
    reasoning: _EffortBody = _EffortBody()
    store: Literal[False] = False
    truncation: Literal["disabled"] = "disabled"

    @classmethod
    def begun(cls, head: AnswerHead, body: ResponsesBody) -> ResponseBody:
        text = (
            {"type": "text"}
            if body.format is None
            else body.format.model_dump(exclude_none=True, by_alias=True)
        )
        return cls(
            id=head["id"],
            created_at=head["created"],
            model=head["model"],
            system_fingerprint=head["system_fingerprint"],
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls is not False,
            temperature=body.temperature,
            text={"format": text},
            tool_choice=_choice(body.tool_choice),
            tools=body.tools or [],
            top_logprobs=body.top_logprobs or 0,
            top_p=body.top_p,
        )

    def completed(
        self, output: list[ItemBody], usage: Usage, speculation: SpeculationStatsBody | None
    ) -> ResponseBody:
        final = {"output": output, "usage": UsageBody.of(usage), "speculation": speculation}
        return self.model_copy(update={**final, "status": "completed"})

    def cut_short(self) -> ResponseBody:
        return self.model_copy(update={"status": "incomplete", "incomplete_details": _IncompleteBody()})

    def failed(self, output: list[ItemBody], message: str) -> ResponseBody:
        error = _ErrorBody(message=message)
        return self.model_copy(update={"output": output, "status": "failed", "error": error})


class EventBody(BaseModel):
    type: str
    sequence_number: int = 0
    """Position in the stream."""


class ResponseEvent(EventBody):
    response: ResponseBody


class ItemEvent(EventBody):
    output_index: int
    item: ItemBody


class _ItemPartEvent(EventBody):
    item_id: str
    output_index: int


class _ContentEvent(_ItemPartEvent):
    content_index: int = 0


class ContentPartEvent(_ContentEvent):
    part: PartBody


class TextDeltaEvent(_ContentEvent):
    type: str = "response.output_text.delta"
    delta: str
    logprobs: list[TokenLogprobBody]


class TextDoneEvent(_ContentEvent):
    type: str = "response.output_text.done"
    text: str
    logprobs: list[TokenLogprobBody]


class ReasoningDeltaEvent(_ContentEvent):
    type: str = "response.reasoning_text.delta"
    delta: str


class ReasoningDoneEvent(_ContentEvent):
    type: str = "response.reasoning_text.done"
    text: str


class ArgumentsDeltaEvent(_ItemPartEvent):
    type: str = "response.function_call_arguments.delta"
    delta: str


class ArgumentsDoneEvent(_ItemPartEvent):
    type: str = "response.function_call_arguments.done"
    name: str
    arguments: str


class ErrorEvent(EventBody):
    """As documented by OpenAI, plus the `error` object that its servers send and clients look for."""

    type: str = "error"
    code: str | None
    message: str
    param: str | None
    error: dict[str, Any]

    @classmethod
    def of(cls, answer: ErrorAnswer) -> ErrorEvent:
        return cls(code=answer.code, message=answer.message, param=answer.param, **answer.body())


def _choice(choice: FlatToolChoiceBody | None) -> str | dict[str, Any]:
    """As requested; keywords stay keywords."""
    if choice is None:
        return "auto"
    asked = choice.model_dump(exclude_none=True)
    return choice.type if asked == {"type": choice.type} else asked
