"""Tools and tool calls in the request bodies of OpenAI's APIs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field

from dspark_core.errors import InvalidRequestError
from dspark_core.output_rules import Grammar
from services.gateway.tools.tools import MAX_TOOLS, Tool, ToolCall, ToolUse, check_tool_count

_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, slots=True)
class Allowed:
    """Tools that may be called, though the model is shown others as well."""

    required: bool
    names: frozenset[str]


class FunctionBody(BaseModel):
    model_config = _STRICT

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema; None: the function takes none."""
    strict: bool | None = None
    """Whether the schema is enforced where calling is optional; where it is required it always is."""

    def to_record(self, place: str) -> Tool:
        """Raises InvalidRequestError. place: where the tool is in the request body."""
        given = {} if self.parameters is None else {"parameters": self.parameters}
        try:
            return Tool(
                name=self.name,
                description=self.description,
                strict=bool(self.strict),
                place=place,
                **given,
            )
        except InvalidRequestError as error:
            raise InvalidRequestError(f"{place}: {error}", field=f"{place}.{error.field}") from None


class _KindBody(BaseModel):
    type: Literal["function"]


class ToolBody(_KindBody):
    model_config = _STRICT

    function: FunctionBody

    def to_record(self, place: str) -> Tool:
        return self.function.to_record(f"{place}.function")


# With this order of bases `type` is validated first: a tool of another type is refused for its type.
class FlatToolBody(FunctionBody, _KindBody):
    """The Responses API's form of a tool."""


class _FunctionNameBody(BaseModel):
    model_config = _STRICT

    name: str


def _choice_of_word(value: object) -> object:
    return {"type": value} if isinstance(value, str) and value != "function" else value


class _AllowedToolsBody(BaseModel):
    model_config = _STRICT

    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolBody], FailFast(), Field(max_length=MAX_TOOLS)]
    """Only their names matter."""


class ToolChoiceBody(BaseModel):
    """A keyword, the function to call, or the tools that may be called."""

    model_config = _STRICT

    type: Literal["none", "auto", "required", "function", "allowed_tools"]
    function: _FunctionNameBody | None = None
    allowed_tools: _AllowedToolsBody | None = None

    @property
    def called(self) -> str | None:
        return self.function.name if self.function else None

    @property
    def allowed(self) -> Allowed | None:
        allowed = self.allowed_tools
        if allowed is None:
            return None
        return Allowed(allowed.mode == "required", frozenset(tool.function.name for tool in allowed.tools))


class FlatToolChoiceBody(BaseModel):
    """The Responses API's form of a tool choice."""

    model_config = _STRICT

    type: Literal["none", "auto", "required", "function", "allowed_tools"]
    name: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[FlatToolBody] | None, FailFast(), Field(max_length=MAX_TOOLS)] = None

    @property
    def called(self) -> str | None:
        return self.name

    @property
    def allowed(self) -> Allowed | None:
        if self.mode is None or self.tools is None:
            return None
        return Allowed(self.mode == "required", frozenset(tool.name for tool in self.tools))


ToolChoice = Annotated[ToolChoiceBody, BeforeValidator(_choice_of_word)]
FlatToolChoice = Annotated[FlatToolChoiceBody, BeforeValidator(_choice_of_word)]


class _CalledFunctionBody(BaseModel):
    model_config = _STRICT

    name: str
    arguments: str
    parsed_arguments: Any = None
    """Added by the `openai` client's helpers: the arguments as an object. Ignored."""


class ToolCallBody(BaseModel):
    """A call of an earlier answer, sent back by the client."""

    model_config = _STRICT

    id: str
    type: Literal["function"] = "function"
    function: _CalledFunctionBody
    index: int | None = None
    """Present if the answer was streamed. Ignored: the order in the list says the same."""

    def to_record(self) -> ToolCall:
        return ToolCall(call_id=self.id, name=self.function.name, arguments=self.function.arguments)


class DeclaredTool(Protocol):
    def to_record(self, place: str) -> Tool: ...


class ChoiceOfTools(Protocol):
    @property
    def type(self) -> str: ...

    @property
    def called(self) -> str | None:
        """Name of the function that must be called."""

    @property
    def allowed(self) -> Allowed | None:
        """The tools that may be called; None: no restriction."""


def tool_use(
    tools: Sequence[DeclaredTool] | None, choice: ChoiceOfTools | None, *, parallel: bool, eager: bool
) -> ToolUse | None:
    """None: no tool may be called. Raises InvalidRequestError naming the field."""
    kind = choice.type if choice else "auto"
    named = choice.called if choice else None
    allowed = choice.allowed if choice else None
    _check_choice(kind, "function", "a function", given=named is not None)
    _check_choice(kind, "allowed_tools", "a mode and tools", given=allowed is not None)
    if not tools:
        if kind in ("required", "function", "allowed_tools"):
            raise InvalidRequestError(f"tool_choice {kind!r} needs tools", field="tool_choice")
        return None
    check_tool_count(len(tools))
    use = ToolUse(
        tools=tuple(tool.to_record(f"tools[{index}]") for index, tool in enumerate(tools)),
        required=kind == "required" or (allowed is not None and allowed.required),
        only=named,
        allowed=None if allowed is None else allowed.names,
        parallel=parallel,
        eager=eager,
    )
    return None if kind == "none" else use


def _check_choice(kind: str, wanted: str, what: str, *, given: bool) -> None:
    if (kind == wanted) != given:
        needed = "cannot have" if given else "needs"
        raise InvalidRequestError(f"tool_choice of type {kind!r} {needed} {what}", field="tool_choice")


def grammar_beside(
    use: ToolUse | None, grammar: Grammar | None, field: str, *, allowed: str = "response_format"
) -> Grammar | None:
    """The grammar of an answer that calls nothing. field: the one that asks for it. allowed: the one that
    asks for JSON. Raises InvalidRequestError.

    An answer that may call can be JSON instead. Where a call is forced, JSON is not asked for: clients that
    read the arguments (Instructor) send their schema twice.
    """
    if use is None or grammar is None:
        return grammar
    if field != allowed:
        others = "a tool_choice that demands a call" if use.forced else f"tools; {allowed} can"
        raise InvalidRequestError(f"{field} cannot be combined with {others}", field=field)
    return None if use.forced else grammar
