"""Tools and calls of them, as clients say it in OpenAI's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from dspark_core.errors import InvalidRequestError
from services.gateway.tools import Tool, ToolCall, ToolUse, check_tool_count

_STRICT = ConfigDict(extra="forbid", strict=True)


class FunctionBody(BaseModel):
    model_config = _STRICT

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema; None: it has none."""
    strict: bool | None = None
    """Whether calls keep to the schema where the model decides to call; what has to be a call does always."""


class ToolBody(BaseModel):
    model_config = _STRICT

    type: Literal["function"]
    function: FunctionBody

    def to_record(self, place: str) -> Tool:
        """Raises InvalidRequestError. place: of the tool in the request's body."""
        function = self.function
        given = {} if function.parameters is None else {"parameters": function.parameters}
        try:
            return Tool(
                name=function.name,
                description=function.description,
                strict=bool(function.strict),
                **given,
            )
        except InvalidRequestError as error:
            field = f"{place}.function.{error.field}"
            raise InvalidRequestError(f"{place}.function: {error}", field=field) from None


class _FunctionNameBody(BaseModel):
    model_config = _STRICT

    name: str


def _choice_of_word(value: object) -> object:
    return {"type": value} if isinstance(value, str) and value != "function" else value


class ToolChoiceBody(BaseModel):
    """A word, or the function to call."""

    model_config = _STRICT

    type: Literal["none", "auto", "required", "function"]
    function: _FunctionNameBody | None = None


ToolChoice = Annotated[ToolChoiceBody, BeforeValidator(_choice_of_word)]


class _CalledFunctionBody(BaseModel):
    model_config = _STRICT

    name: str
    arguments: str
    parsed_arguments: Any = None
    """Of `openai`'s helpers: the arguments once more, as an object."""


class ToolCallBody(BaseModel):
    """Of an answer that comes back."""

    model_config = _STRICT

    id: str
    type: Literal["function"] = "function"
    function: _CalledFunctionBody
    index: int | None = None
    """Of an answer that was streamed: its place, which it has here too."""

    def to_record(self) -> ToolCall:
        return ToolCall(call_id=self.id, name=self.function.name, arguments=self.function.arguments)


def tool_use(
    tools: Sequence[ToolBody] | None, choice: ToolChoiceBody | None, *, parallel: bool, eager: bool
) -> ToolUse | None:
    """None: nothing may be called. Raises InvalidRequestError naming the field."""
    kind = choice.type if choice else "auto"
    named = choice.function.name if choice and choice.function else None
    if (kind == "function") != (named is not None):
        needed = "needs" if named is None else "cannot have"
        raise InvalidRequestError(f"tool_choice of type {kind!r} {needed} a function", field="tool_choice")
    if not tools:
        if kind in ("required", "function"):
            raise InvalidRequestError(f"tool_choice {kind!r} needs tools", field="tool_choice")
        return None
    check_tool_count(len(tools))
    use = ToolUse(
        tools=tuple(tool.to_record(f"tools[{index}]") for index, tool in enumerate(tools)),
        required=kind == "required",
        only=named,
        parallel=parallel,
        eager=eager,
    )
    return None if kind == "none" else use


def refuse_other_shapes(use: ToolUse | None, given: Mapping[str, object | None]) -> None:
    """given: fields that say what an answer has to be, where they ask for anything.

    An answer that has to call cannot be something else as well; one that may call can be JSON instead.
    """
    for field, value in given.items():
        if use is None or value is None:
            continue
        if use.forced:
            raise InvalidRequestError(
                f"{field} cannot be combined with a tool_choice that demands a call", field=field
            )
        if field != "response_format":
            raise InvalidRequestError(
                f"{field} cannot be combined with tools; response_format can", field=field
            )
