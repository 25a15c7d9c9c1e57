"""Constraints on the form of an answer, in the fields of OpenAI's APIs and of other engines."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field

from dspark_core.errors import InvalidRequestError
from dspark_core.output_rules import Grammar, GrammarKind

_STRICT = ConfigDict(extra="forbid", strict=True)

MAX_CHOICE_TEXTS = 16_384
"""More never fit into a grammar."""


class JsonSchemaBody(BaseModel):
    model_config = _STRICT

    name: str
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    description: str | None = None
    strict: bool | None = None
    """Has no effect: the schema is always enforced."""


FormatKind = Literal["text", "json_object", "json_schema"]


class ResponseFormatBody(BaseModel):
    model_config = _STRICT

    type: FormatKind
    json_schema: JsonSchemaBody | None = None

    def to_grammar(self) -> Grammar | None:
        """None: the answer may be anything. Raises InvalidRequestError."""
        if (self.json_schema is not None) != (self.type == "json_schema"):
            needed = "needs" if self.json_schema is None else "cannot have"
            raise InvalidRequestError(
                f"response_format of type {self.type!r} {needed} json_schema", field="response_format"
            )
        return _format_grammar(self.type, self.json_schema.schema_ if self.json_schema else None)


class TextFormatBody(BaseModel):
    """The Responses API's form of a response format."""

    model_config = _STRICT

    type: FormatKind
    name: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    description: str | None = None
    strict: bool | None = None
    """Has no effect: the schema is always enforced."""

    def to_grammar(self) -> Grammar | None:
        """None: the answer may be anything. Raises InvalidRequestError."""
        if (self.schema_ is not None) != (self.type == "json_schema"):
            needed = "needs" if self.schema_ is None else "cannot have"
            raise InvalidRequestError(
                f"text.format of type {self.type!r} {needed} a schema", field="text.format"
            )
        return _format_grammar(self.type, self.schema_)


FormatBody = ResponseFormatBody | TextFormatBody


class StructuredOutputsBody(BaseModel):
    """At most one field may be set."""

    model_config = _STRICT

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    """A JSON schema, or its text."""
    regex: str | None = None
    choice: Annotated[list[str] | None, FailFast(), Field(max_length=MAX_CHOICE_TEXTS)] = None
    grammar: str | None = None
    """In Lark notation."""

    def to_grammar(self) -> Grammar | None:
        """None: no constraint is given. Raises InvalidRequestError."""
        given = self.model_dump(exclude_none=True, by_alias=True)
        if len(given) > 1:
            names = ", ".join(given)
            raise InvalidRequestError(
                f"structured_outputs must be one of json, regex, choice, grammar, got {names}",
                field="structured_outputs",
            )
        if self.regex is not None:
            return Grammar(kind=GrammarKind.REGEX, text=self.regex)
        if self.grammar is not None:
            return Grammar(kind=GrammarKind.LARK, text=self.grammar)
        if self.choice is not None:
            return Grammar(kind=GrammarKind.LARK, text=_choice(self.choice))
        return None if self.json_ is None else _json_grammar(self.json_)


def _format_grammar(kind: FormatKind, schema: dict[str, Any] | None) -> Grammar | None:
    if kind == "text":
        return None
    return _json_grammar({"type": "object"} if schema is None else schema)


def _json_grammar(schema: dict[str, Any] | str) -> Grammar:
    text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=text)


def _choice(texts: list[str]) -> str:
    if not texts or not all(texts):
        raise InvalidRequestError(
            f"structured_outputs.choice must be texts to choose from, got {texts!r:.80}",
            field="structured_outputs",
        )
    # A terminal becomes one automaton. Alternatives of a rule are followed one by one, up to 2,000 of them.
    return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(text) for text in texts)
