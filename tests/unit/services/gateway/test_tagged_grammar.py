"""Schemas of arguments as Qwen3-Coder writes them: what a grammar allows parses and satisfies the schema."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken

from dspark_core.errors import InvalidRequestError
from dspark_core.tokenization.grammar_sources import AddedTokens, grammar_source
from dspark_core.tokenization.tool_formats import SYNTAX, ToolFormat
from services.gateway.tools.parameter_kinds import parameter_kinds
from services.gateway.tools.tool_grammar import call_grammar, strict_grammar
from services.gateway.tools.tool_stream import CallStream
from services.gateway.tools.tools import Tool
from tests.support.byte_tokenizer import END, byte_backend

CODER = SYNTAX[ToolFormat.QWEN3_CODER]
OBJECT: dict[str, Any] = {"type": "object", "additionalProperties": False}
TEXT: dict[str, Any] = {"type": "string"}


def allowed(
    schema: dict[str, Any], values: list[tuple[str, str]], *, tokens: bool, strict: bool = True
) -> bool:
    """values: name and value of each parameter. Also checks that what is allowed satisfies the schema."""
    backend = byte_backend()
    if tokens:
        backend.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in CODER.marks])
    tool = Tool(name="f", parameters=schema, strict=strict)
    build = call_grammar if strict else strict_grammar
    grammar = build(
        CODER, [tool], several=False, token_id=lambda text: backend.token_to_id(text) if tokens else None
    )
    tokenizer = LLTokenizer(
        backend.to_str(), n_vocab=backend.get_vocab_size(with_added_tokens=True), eos_token=[END]
    )
    added = AddedTokens(CODER.marks if tokens else ())
    matcher = LLMatcher(tokenizer, grammar_source(grammar, added), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values)
    text = f"<tool_call>\n<function=f>\n{inner}</function>\n</tool_call>"
    token_ids = backend.encode(text, add_special_tokens=False).ids
    whole = matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()
    if whole and strict:
        jsonschema.validate(read(text, schema), schema)
    return whole


def read(text: str, schema: dict[str, Any]) -> Any:
    stream = CallStream(CODER, {"f"}, eager=False, parallel=True, kinds={"f": parameter_kinds(schema)})
    calls = (*stream.push(text).calls, *stream.flush().calls)
    assert stream.called, text
    return json.loads("".join(call.arguments for call in calls))


NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "additionalProperties": False}
ROOT = {**OBJECT, "properties": {"a": {"$ref": "#/$defs/node"}}, "$defs": {"node": NODE}}
ITSELF = {**OBJECT, "properties": {"a": {"type": "array", "items": {"$ref": "#"}}, "b": TEXT}}


def of(schema: object, *required: str) -> dict[str, Any]:
    return {**OBJECT, "properties": {"a": schema}, "required": list(required)}


@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (
            {
                **OBJECT,
                "properties": {"city": TEXT, "days": {"type": "integer", "minimum": 1}},
                "required": ["city"],
            },
            [
                [("city", "Paris")],
                [("city", 'if a < b:\n    "</p>"\n'), ("days", "3")],
                [("city", ""), ("days", "12")],
                [("city", "12")],
            ],
            [
                [],
                [("days", "3")],
                [("city", "P"), ("days", "0")],
                [("city", "P"), ("days", "three")],
                [("city", "P"), ("town", "x")],
                [("days", "3"), ("city", "P")],
            ],
        ),
        ({**OBJECT, "properties": {}}, [[]], [[("a", "1")]]),
        (of({"enum": ["C", "F"]}), [[], [("a", "C")]], [[("a", "K")], [("a", '"C"')]]),
        (of({"const": "C"}, "a"), [[("a", "C")]], [[], [("a", "K")]]),
        (of({"type": ["string", "null"]}), [[("a", "null")], [("a", "x")], [("a", "7")]], []),
        (of({"anyOf": [TEXT, {"type": "null"}]}), [[("a", "null")], [("a", "x")]], []),
        (of({"anyOf": [{"type": "string", "maxLength": 2}]}), [[("a", "xy")]], [[("a", "xyz")]]),
        (of({"anyOf": [{"const": "x"}, {"enum": ["y"]}]}), [[("a", '"y"')]], [[("a", "z")], [("a", '"z"')]]),
        (of({"anyOf": [TEXT], "maxLength": 2}), [[("a", '"xy"')]], [[("a", "xy")]]),
        (of({"anyOf": [TEXT], "enum": ["x"]}), [[("a", '"x"')]], [[("a", "y")], [("a", '"y"')]]),
        (of({"enum": ["x", None]}), [[("a", '"x"')], [("a", "null")]], [[("a", "x")]]),
        (of({"type": ["string", "integer"]}), [[("a", '"x"')], [("a", "7")]], [[("a", "x")]]),
        (of({"type": "string", "maxLength": 2}), [[("a", "éé")]], [[("a", "abc")]]),
        (of({"type": "string", "pattern": "^[0-9]+$"}), [[("a", '"12"')]], [[("a", "12")], [("a", '"x"')]]),
        (of({"type": "boolean"}), [[("a", "true")]], [[("a", "True")], [("a", "null")]]),
        (
            of({"type": "array", "items": TEXT, "maxItems": 2}),
            [[("a", "[]")], [("a", '["x", "y"]')]],
            [[("a", "x")], [("a", '["x", "y", "z"]')]],
        ),
        (ROOT, [[], [("a", '{"next": {"next": {}}}')]], [[("a", '{"b": 1}')], [("a", "1")]]),
        (
            ITSELF,
            [[("a", '[{"a": [], "b": "x"}]'), ("b", "y")]],
            [[("a", '[{"c": 1}]')], [("a", '["x"]')]],
        ),
        ({"type": "object"}, [[], [("x", "1"), ("y-z", "any\ntext")]], []),
        (
            {"type": "object", "additionalProperties": {"type": "integer"}},
            [[], [("x", "1"), ("y", "2")]],
            [[("x", "one")]],
        ),
    ],
)
def test_arguments_keep_to_their_schema(schema, good, bad, tokens) -> None:
    for values in good:
        assert allowed(schema, values, tokens=tokens), values
    for values in bad:
        assert not allowed(schema, values, tokens=tokens), values


def test_arguments_of_functions_that_are_not_strict_are_any_parameters() -> None:
    schema = of({"type": "integer"}, "a")
    for values in ([], [("a", "x")], [("b", "y"), ("c", "")]):
        assert allowed(schema, values, tokens=True, strict=False)


@pytest.mark.parametrize(
    "schema",
    [
        {"minProperties": 1},
        {"required": ["a"]},
        {"properties": {"a": TEXT}, "required": ["b"]},
        {"properties": {"a": False}},
        {"properties": {"a>b": TEXT}},
        {"properties": {"a": {"type": "string", "minLength": "2"}}},
    ],
)
def test_what_cannot_be_demanded_is_refused_by_its_place(schema) -> None:
    tool = Tool(name="f", parameters=schema, place="tools[2].function")
    with pytest.raises(InvalidRequestError, match=r"tools\[2\]\.function\.parameters: .* demanded") as error:
        call_grammar(CODER, [tool], several=False, token_id=lambda _: None)
    assert error.value.field == "tools[2].function.parameters"


def test_references_that_lead_back_end() -> None:
    forks = {"anyOf": [{"$ref": "#/$defs/forks"}] * 3}
    schema = {"properties": {"a": {"$ref": "#/$defs/forks"}}, "$defs": {"forks": forks}}
    assert parameter_kinds(schema).of("a") == parameter_kinds({}).other
