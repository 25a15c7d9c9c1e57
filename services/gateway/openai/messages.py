"""Messages of a conversation in the request body of chat completions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field
from pydantic_core import PydanticCustomError

from dspark_core.errors import InvalidRequestError
from services.gateway.openai.tool_fields import ToolCallBody
from services.gateway.requests import MAX_MESSAGES, ChatMessage, ChatRole


def joined_text(*kinds: str) -> Callable[[object], object]:
    """Makes a validator that joins content given as a list of parts. kinds: types of parts with text; others
    are refused."""
    known = " or ".join(map(repr, kinds))

    def join(value: object) -> object:
        if not isinstance(value, list):
            return value
        texts = []
        for index, part in enumerate(value):
            kind = part.get("type") if isinstance(part, Mapping) else None
            text = part.get(kind if kind == "refusal" else "text") if kind in kinds else None
            if not isinstance(text, str):
                raise PydanticCustomError(
                    "content_part",
                    "part {index} must be of type {known}, got {kind}: "
                    "images, audio and files are not supported",
                    {"index": index, "known": known, "kind": repr(kind)},
                )
            texts.append(text)
        return "".join(texts)

    return join


class ChatMessageBody(BaseModel):
    """`developer` is the newer name of `system`. Clients may send back the fields of an answer if they are
    empty, and fields that they added to it, which are ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(joined_text("text", "refusal"))] = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCallBody] | None, FailFast(), Field(max_length=MAX_MESSAGES)] = None
    tool_call_id: str | None = None
    refusal: str | None = None
    """What other servers' models say in place of content."""
    annotations: Annotated[list[None] | None, FailFast()] = None
    audio: None = None
    function_call: None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    """The thought of an earlier answer, under either name; chat templates that use it are given it."""
    parsed: Any = None
    """Added by the `openai` client's helpers: the content as an object."""
    provider_specific_fields: Any = None
    """Added by LiteLLM: fields of the answer that it has no place for, here the empty refusal."""

    def to_record(self, place: str) -> ChatMessage:
        """Raises InvalidRequestError. place: where the message is in the request body."""
        self._check(place)
        return ChatMessage(
            role=ChatRole.SYSTEM if self.role == "developer" else ChatRole(self.role),
            content=self.content or self.refusal or "",
            tool_calls=tuple(call.to_record() for call in self.tool_calls or ()),
            reasoning=self.reasoning_content or self.reasoning or "",
            tool_call_id=self.tool_call_id,
        )

    def _check(self, place: str) -> None:
        if self.tool_calls and self.role != "assistant":
            raise _wrong(f"{place}.tool_calls", f"belong to messages of the assistant, not of {self.role!r}")
        for name in ("reasoning", "reasoning_content", "refusal"):
            if getattr(self, name) and self.role != "assistant":
                raise _wrong(f"{place}.{name}", f"belongs to messages of the assistant, not of {self.role!r}")
        if self.role == "tool" and not self.tool_call_id:
            raise _wrong(f"{place}.tool_call_id", "is required in messages of role 'tool'")
        if self.role != "tool" and self.tool_call_id is not None:
            raise _wrong(f"{place}.tool_call_id", f"belongs to messages of role 'tool', not of {self.role!r}")
        if self.content is None and not self.tool_calls and not self.refusal:
            missing = "content" not in self.model_fields_set
            raise _wrong(
                f"{place}.content", "is required but missing" if missing else "must be a text, got None"
            )


def _wrong(field: str, problem: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field} {problem}", field=field)
