"""Functions that an answer may call, as the client describes them, and whether it must."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dspark_core.errors import InvalidRequestError, require
from services.gateway.json_schemas import without_annotations

MAX_TOOLS = 128
MAX_TOOL_CHARACTERS = 65_536
"""Size of one tool, serialised as JSON."""
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    name: str
    description: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=lambda: _NO_PARAMETERS)
    """JSON schema of an object."""
    strict: bool = False
    """Whether the schema is enforced even where calling is optional."""
    place: str = field(default="tool", compare=False)
    """Where the client declares it, in the client's terms, for error messages."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InvalidRequestError(
                f"name must be 1 to 64 letters, digits, - or _, got {self.name!r:.80}", field="name"
            )
        kind = self.parameters.get("type", "object")
        if kind != "object":
            raise InvalidRequestError(
                f"parameters must be of type 'object', got {kind!r:.80}", field="parameters"
            )
        size = len(json.dumps(self.declared, ensure_ascii=False))
        if size > MAX_TOOL_CHARACTERS:
            raise InvalidRequestError(
                f"parameters and description must be <= {MAX_TOOL_CHARACTERS} characters of JSON, got {size}",
                field="parameters",
            )

    @property
    def declared(self) -> dict[str, Any]:
        """The tool in the form of OpenAI's API, which chat templates expect."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": {**function, "parameters": dict(self.parameters)}}

    @property
    def schema(self) -> str:
        """JSON schema of the arguments, without annotations."""
        bare = without_annotations({"type": "object", **self.parameters})
        return json.dumps(bare, ensure_ascii=False)


def check_tool_count(count: int) -> None:
    """Part of `ToolUse`'s checks; callers also run it before they build the tools."""
    require(1 <= count <= MAX_TOOLS, "tools", f"{count} tools", f"of 1 to {MAX_TOOLS} tools")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """Which tools an answer may or must call."""

    tools: tuple[Tool, ...]
    required: bool = False
    """Whether the answer must consist of calls."""
    only: str | None = None
    """Name of the one tool that must be called, once."""
    allowed: frozenset[str] | None = None
    """Names of the tools that may be called, though the model is shown all; None: all."""
    parallel: bool = True
    """Whether the answer may contain several calls."""
    eager: bool = False
    """Whether the client wants fragments of calls before they are complete."""

    def __post_init__(self) -> None:
        check_tool_count(len(self.tools))
        repeated = [name for name, count in Counter(tool.name for tool in self.tools).items() if count > 1]
        if repeated:
            raise InvalidRequestError(
                f"tools must have names of their own, got {repeated[0]!r} twice", field="tools"
            )
        if self.only is not None and all(tool.name != self.only for tool in self.tools):
            raise InvalidRequestError(
                f"tool_choice names {self.only!r:.80}, which is none of the tools", field="tool_choice"
            )
        if self.allowed is not None:
            self._check_allowed(self.allowed)

    def _check_allowed(self, allowed: frozenset[str]) -> None:
        if not allowed:
            raise InvalidRequestError("tool_choice must allow at least one tool, got []", field="tool_choice")
        for name in sorted(allowed - {tool.name for tool in self.tools}):
            raise InvalidRequestError(
                f"tool_choice allows {name!r:.80}, which is none of the tools", field="tool_choice"
            )

    @property
    def callable(self) -> Mapping[int, Tool]:
        """Tools that may be called, by index."""
        return {index: tool for index, tool in enumerate(self.tools) if self._may_be_called(tool.name)}

    def _may_be_called(self, name: str) -> bool:
        return (self.only is None or name == self.only) and (self.allowed is None or name in self.allowed)

    @property
    def forced(self) -> Mapping[int, Tool]:
        """Tools of which one must be called, by index; empty: calling is optional."""
        return self.callable if self.required or self.only is not None else {}

    @property
    def bounded(self) -> bool:
        """Whether calls need a grammar even where calling is optional."""
        return len(self.callable) < len(self.tools) or any(tool.strict for tool in self.callable.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call in an answer, or in an assistant message of the conversation."""

    call_id: str
    name: str
    arguments: str
    """JSON, unless the model got it wrong."""
