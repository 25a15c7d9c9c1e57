"""The request body of OpenAI's Responses API, as far as it is supported: nothing is stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, FailFast, Field

from dspark_core.errors import InvalidRequestError, require
from services.gateway.openai.fields import STRICT, ConversationBody
from services.gateway.openai.grammar import TextFormatBody
from services.gateway.openai.responses_input import InputItem, input_items, messages_of, without_nulls
from services.gateway.openai.tool_fields import FlatToolBody, FlatToolChoice
from services.gateway.requests import MAX_MESSAGES, ChatMessage, ChatRole, Conversation, TextRequest
from services.gateway.tools.tools import MAX_TOOLS

_LOGPROBS: Literal["message.output_text.logprobs"] = "message.output_text.logprobs"

Include = Literal[
    "message.output_text.logprobs",
    # No effect: answers never contain these here.
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
]


class TextBody(BaseModel):
    model_config = STRICT

    format: TextFormatBody | None = None
    verbosity: Literal["medium"] | None = None
    """Other values ask for a different answer, and are refused."""


class ResponsesBody(ConversationBody):
    format_field = "text.format"
    unsupported: ClassVar = {
        "truncation": ("disabled",),
        "reasoning": ({}, {"effort": "none"}),
        "context_management": ([],),
        "moderation": (),
    }
    stateful: ClassVar[Mapping[str, str]] = {
        "previous_response_id": "send all of the conversation as input",
        "conversation": "send all of it as input",
        "prompt": "send its text as instructions or input",
        "background": "wait for the answer, or stream it",
    }
    """Refused fields, and what to do instead."""

    input: Annotated[
        list[InputItem], FailFast(), Field(max_length=MAX_MESSAGES), BeforeValidator(input_items)
    ]
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: TextBody | None = None
    tools: Annotated[list[FlatToolBody] | None, FailFast(), Field(max_length=MAX_TOOLS)] = None
    tool_choice: FlatToolChoice | None = None
    include: Annotated[list[Include] | None, FailFast()] = None
    metadata: dict[str, str] | None = None
    previous_response_id: Any = None
    conversation: Any = None
    prompt: Any = None
    background: Any = None
    truncation: Any = None
    reasoning: Annotated[Any, BeforeValidator(without_nulls)] = None
    context_management: Any = None
    moderation: Any = None

    # Accepted, but without effect on the answer.
    max_tool_calls: Any = None
    """Limits calls of built-in tools, which the server would run itself."""

    @property
    def format(self) -> TextFormatBody | None:
        return self.text.format if self.text else None

    @property
    def includes_logprobs(self) -> bool:
        return _LOGPROBS in (self.include or ())

    def _refuse_stateful(self) -> None:
        for name, instead in self.stateful.items():
            value = getattr(self, name)
            if value is not None and value is not False:
                raise InvalidRequestError(
                    f"{name} {value!r:.80} is not supported: this server keeps no state; {instead}",
                    field=name,
                )

    def to_request(self, request_id: str) -> TextRequest:
        self._refuse_stateful()
        limit = self.max_output_tokens
        if limit is not None:
            require(limit >= 1, "max_output_tokens", limit, ">= 1")
        if self.top_logprobs and not self.includes_logprobs:
            raise InvalidRequestError(
                f"top_logprobs {self.top_logprobs} needs {_LOGPROBS!r} in include", field="top_logprobs"
            )
        if self.includes_logprobs and self.tools:
            raise InvalidRequestError(
                f"include {_LOGPROBS!r} cannot be combined with tools: calls have no place for them",
                field="include",
            )
        messages = messages_of(self.input)
        if self.instructions is not None:
            messages = (ChatMessage(role=ChatRole.SYSTEM, content=self.instructions), *messages)
        return self._next_turn(
            request_id,
            Conversation(messages=messages, field="input"),
            limit,
            logprobs=self.includes_logprobs,
            tools=self.tools,
            tool_choice=self.tool_choice,
        )
