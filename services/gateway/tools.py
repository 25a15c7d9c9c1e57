"""Functions that an answer may call, as a client describes them, and how far it must."""

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
"""Of one tool as JSON."""
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    name: str
    description: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=lambda: _NO_PARAMETERS)
    """A JSON schema of an object."""
    strict: bool = False
    """Its arguments keep to the schema also where nothing has to be called."""
    place: str = field(default="tool", compare=False)
    """Where the client declares it, in its words."""

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
        """As OpenAI's API has it, and chat templates take it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": {**function, "parameters": dict(self.parameters)}}

    @property
    def schema(self) -> str:
        """Of the arguments, as JSON, without what only tells readers of it."""
        bare = without_annotations({"type": "object", **self.parameters})
        return json.dumps(bare, ensure_ascii=False)


def check_tool_count(count: int) -> None:
    """Also for those who have tools yet to make: before that."""
    require(1 <= count <= MAX_TOOLS, "tools", f"{count} tools", f"of 1 to {MAX_TOOLS} tools")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """What an answer may call, or must."""

    tools: tuple[Tool, ...]
    required: bool = False
    """The answer is calls and nothing else."""
    only: str | None = None
    """The one to call, once."""
    allowed: frozenset[str] | None = None
    """Those that may be called, though the model is told of all; None: all."""
    parallel: bool = True
    """The answer may call several times."""
    eager: bool = False
    """Whoever asked wants to hear of calls before they are whole."""

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
        """Those that may be called, by their place."""
        return {index: tool for index, tool in enumerate(self.tools) if self._may_be_called(tool.name)}

    def _may_be_called(self, name: str) -> bool:
        return (self.only is None or name == self.only) and (self.allowed is None or name in self.allowed)

    @property
    def forced(self) -> Mapping[int, Tool]:
        """Those of which one has to be called, by their place; empty: none has to."""
        return self.callable if self.required or self.only is not None else {}

    @property
    def bounded(self) -> bool:
        """What is called has to be looked after though nothing has to be."""
        return len(self.callable) < len(self.tools) or any(tool.strict for tool in self.callable.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """Of an answer, or of a message that was one."""

    call_id: str
    name: str
    arguments: str
    """JSON, unless the model failed at it."""
