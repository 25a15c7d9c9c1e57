"""Conversations in OpenAI's Responses API: lists of items, of which messages are one kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, FailFast, Field, Tag

from services.gateway.openai.fields import STRICT
from services.gateway.openai.messages import joined_text
from services.gateway.requests import MAX_MESSAGES, ChatMessage, ChatRole
from services.gateway.tools.tools import ToolCall

_Text = Annotated[str, BeforeValidator(joined_text("input_text", "output_text", "refusal"))]


class _ItemBody(BaseModel):
    """Items of earlier answers are sent back with their ids and statuses, which are ignored."""

    model_config = STRICT

    id: Any = None
    status: Any = None


class MessageItem(_ItemBody):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: _Text
    phase: Any = None

    def to_record(self) -> ChatMessage:
        role = ChatRole.SYSTEM if self.role == "developer" else ChatRole(self.role)
        return ChatMessage(role=role, content=self.content)


class CallItem(_ItemBody):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    parsed_arguments: Any = None
    """Added by the `openai` client's helpers: the arguments as an object. Ignored."""

    def to_record(self) -> ChatMessage:
        call = ToolCall(call_id=self.call_id, name=self.name, arguments=self.arguments)
        return ChatMessage(role=ChatRole.ASSISTANT, content="", tool_calls=(call,))


class CallOutputItem(_ItemBody):
    type: Literal["function_call_output"]
    call_id: str
    output: _Text

    def to_record(self) -> ChatMessage:
        return ChatMessage(role=ChatRole.TOOL, content=self.output, tool_call_id=self.call_id)


class _ThoughtBody(BaseModel):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(BaseModel):
    """The thought before an answer; from other servers it is mostly without content, and dropped."""

    type: Literal["reasoning"]
    content: Annotated[list[_ThoughtBody] | None, FailFast(), Field(max_length=MAX_MESSAGES)] = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content or ())


def without_nulls(value: object) -> object:
    """Drops null fields: clients send every field of an object that they know, most of them null."""
    if not isinstance(value, dict):
        return value
    return {name: field for name, field in value.items() if field is not None}


def _tag(value: object) -> str:
    """Not an identifier, so that `field_path` leaves it out of the field names in errors."""
    kind = value.get("type", "message") if isinstance(value, Mapping) else "message"
    return f"<{kind}>"


InputItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[CallItem, Tag("<function_call>")]
    | Annotated[CallOutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")],
    Discriminator(
        _tag,
        custom_error_type="input_item",
        custom_error_message="must be of type message, function_call, function_call_output or reasoning; "
        "nothing is stored here that an item_reference could name: clients send items with store false",
    ),
    BeforeValidator(without_nulls),
]


def input_items(value: object) -> object:
    """Turns a plain string into a user message."""
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def messages_of(items: Iterable[InputItem]) -> tuple[ChatMessage, ...]:
    """Joins a thought and consecutive texts and calls of the assistant into one message, so that the prompt
    has them as the model wrote them."""
    turns: list[list[ChatMessage]] = []
    thought = ""
    for item in items:
        if isinstance(item, ReasoningItem):
            thought += item.text
            continue
        message = item.to_record()
        if message.role is ChatRole.ASSISTANT:
            message = replace(message, reasoning=thought)
        thought = ""
        if turns and _goes_on(turns[-1], message):
            turns[-1].append(message)
        else:
            turns.append([message])
    return tuple(_one(turn) for turn in turns)


def _goes_on(turn: Sequence[ChatMessage], message: ChatMessage) -> bool:
    if message.role is not ChatRole.ASSISTANT or turn[0].role is not ChatRole.ASSISTANT:
        return False
    calls_before = len(turn) > 1 or turn[0].tool_calls  # texts without calls stay separate messages
    return bool(calls_before or message.tool_calls)


def _one(turn: Sequence[ChatMessage]) -> ChatMessage:
    if len(turn) == 1:
        return turn[0]
    return ChatMessage(
        role=ChatRole.ASSISTANT,
        content="".join(message.content for message in turn),
        reasoning="".join(message.reasoning for message in turn),
        tool_calls=tuple(call for message in turn for call in message.tool_calls),
    )
