"""Schemas of arguments as Gemma 4 writes them: what the grammar allows parses and satisfies the schema."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken

from dspark_core.errors import InvalidRequestError
from dspark_core.tokenization.grammar_sources import grammar_source
from dspark_core.tokenization.tool_formats import SYNTAX, ToolFormat
from services.gateway.tools.tool_grammar import call_grammar, strict_grammar
from services.gateway.tools.tool_stream import CallStream
from services.gateway.tools.tools import Tool
from tests.support.byte_tokenizer import END, byte_backend

GEMMA = SYNTAX[ToolFormat.GEMMA4]
OBJECT: dict[str, Any] = {"type": "object", "additionalProperties": False}


def allowed(schema: dict[str, Any], arguments: str, *, tokens: bool, strict: bool = True) -> bool:
    """arguments: as the model writes them. Also checks that allowed ones parse and satisfy the schema."""
    backend = byte_backend()
    if tokens:
        backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in GEMMA.marks])
    tool = Tool(name="f", parameters=schema, strict=strict)
    build = call_grammar if strict else strict_grammar
    grammar = build(
        GEMMA, [tool], several=False, token_id=lambda text: backend.token_to_id(text) if tokens else None
    )
    tokenizer = LLTokenizer(
        backend.to_str(), n_vocab=backend.get_vocab_size(with_added_tokens=True), eos_token=[END]
    )
    matcher = LLMatcher(tokenizer, grammar_source(grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    text = f"{GEMMA.begin}call:f{arguments}{GEMMA.end}"
    token_ids = backend.encode(text, add_special_tokens=False).ids
    whole = matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()
    if whole:
        jsonschema.validate(read(text), schema)
    return whole


def read(text: str) -> Any:
    stream = CallStream(GEMMA, {"f"}, eager=False, parallel=True)
    calls = (*stream.push(text).calls, *stream.flush().calls)
    assert stream.called, text
    return json.loads("".join(call.arguments for call in calls))


CITY = {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}, "Unit": {"enum": ["C", "F"]}}
NODE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            **OBJECT,
            "properties": {"name": {"type": "string"}, "next": {"$ref": "#/$defs/node"}},
            "required": ["name"],
        }
    },
}
TREE = {**OBJECT, "properties": {"root": {"$ref": NODE["$ref"]}}, "$defs": NODE["$defs"]}


@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (
            {**OBJECT, "properties": CITY, "required": ["city"]},
            [
                '{city:<|"|>Paris, "{}"\n[France]<|"|>}',
                '{city:<|"|><|"|>,days:3}',
                '{city:<|"|>P<|"|>,days:3,Unit:<|"|>C<|"|>}',
                '{city:<|"|>P<|"|>,Unit:<|"|>F<|"|>}',
            ],
            [
                "{}",
                "{days:3}",
                '{city:<|"|>P<|"|>,}',
                '{city:"P"}',
                '{city:<|"|>P<|"|>,days:0}',
                '{city:<|"|>P<|"|>,days:<|"|>3<|"|>}',
                '{city:<|"|>P<|"|>,Unit:<|"|>K<|"|>}',
                '{city:<|"|>P<|"|>,town:1}',
                '{city:<|"|>P<|"|>',
            ],
        ),
        ({**OBJECT, "properties": {}}, ["{}"], ["{a:1}", ""]),
        (
            {"type": "object"},
            ["{}", '{a:1,b:[true,{c:null}],d-e:<|"|>x<|"|>}', '{é:[<|"|>a<|"|>,<|"|>b<|"|>,[]]}'],
            ["[]", "{a}", "{a:1", "{a:b}"],
        ),
        (
            {**OBJECT, "properties": {"a": {"type": "array", "items": {"type": "number"}, "maxItems": 2}}},
            ["{}", "{a:[]}", "{a:[1]}", "{a:[-1.5,2e3]}"],
            ["{a:[1,2,3]}", '{a:[<|"|>1<|"|>]}', "{a:[1,]}"],
        ),
        (
            {**OBJECT, "properties": {"a": {"type": "array", "minItems": 2, "maxItems": 2}}},
            ['{a:[1,<|"|>x<|"|>]}'],
            ["{a:[]}", "{a:[1]}", "{a:[1,2,3]}"],
        ),
        (
            {**OBJECT, "properties": {"a": {"type": ["string", "null"], "maxLength": 3, "minLength": 1}}},
            ['{a:<|"|>éé\n<|"|>}', "{a:null}"],
            ['{a:<|"|>abcd<|"|>}', '{a:<|"|><|"|>}', "{a:3}"],
        ),
        (
            {**OBJECT, "properties": {"a": {"anyOf": [{"type": "boolean"}, {"const": "no"}]}}},
            ["{a:true}", '{a:<|"|>no<|"|>}'],
            ["{a:null}", '{a:<|"|>yes<|"|>}'],
        ),
        (
            {**OBJECT, "properties": {"a": {"type": "string", "pattern": "^[0-9]{4}$"}}},
            ['{a:"2026"}'],  # a JSON string, which is read as well
            ['{a:"26"}', '{a:<|"|>2026<|"|>}'],
        ),
        (
            {**OBJECT, "properties": {"a b": {"type": "null"}, "": {"type": "null"}}},
            ['{<|"|><|"|>:null,<|"|>a b<|"|>:null}'],
            ["{a b:null}"],
        ),
        (
            {"type": "object", "additionalProperties": {"type": "integer"}},
            ["{}", "{a:1,b:2}"],
            ["{a:true}"],
        ),
        (
            TREE,
            ['{root:{name:<|"|>a<|"|>,next:{name:<|"|>b<|"|>}}}'],
            ['{root:{next:{name:<|"|>b<|"|>}}}'],
        ),
    ],
)
def test_arguments_keep_to_their_schema(schema, good, bad, tokens) -> None:
    for arguments in good:
        assert allowed(schema, arguments, tokens=tokens), arguments
    for arguments in bad:
        assert not allowed(schema, arguments, tokens=tokens), arguments


def test_arguments_of_functions_that_are_not_strict_are_any_object() -> None:
    schema = {**OBJECT, "properties": CITY}
    for arguments in ("{}", '{city:<|"|>P<|"|>}'):
        assert allowed(schema, arguments, tokens=True, strict=False)
    assert not allowed(schema, "{city:}", tokens=True, strict=False)


@pytest.mark.parametrize(
    "schema",
    [
        {"oneOf": [{"type": "string"}, {"type": "integer"}]},
        {"type": "object", "minProperties": 1},
        {"type": "object", "required": ["a"]},
        {"type": "object", "properties": {"a": True}, "required": ["b"]},
        {"type": "object", "properties": 3},
        {"type": "array", "prefixItems": [{}]},
        {"type": "array", "minItems": "2"},
        {"type": "strange"},
        {"enum": [{"a": 1}]},
        {"enum": [float("nan")]},
        {"const": float("inf")},
        {"enum": 3},
        {"anyOf": 3},
        {"allOf": [{"type": "string"}, {"maxLength": 3}]},
        {"$ref": "https://example.org/schema"},
        {"$ref": "#/$defs/none"},
        {"minimum": 3},
        False,
    ],
)
def test_what_cannot_be_demanded_is_refused_by_its_place(schema) -> None:
    tool = Tool(name="f", parameters={"properties": {"a": schema}}, place="tools[2].function")
    with pytest.raises(InvalidRequestError, match=r"tools\[2\]\.function\.parameters: .* demanded") as error:
        call_grammar(GEMMA, [tool], several=False, token_id=lambda _: None)
    assert error.value.field == "tools[2].function.parameters"


def test_deep_schemas_are_refused() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(190):
        schema = {"type": "array", "items": schema}
    tool = Tool(name="f", parameters={"properties": {"a": schema}})
    with pytest.raises(InvalidRequestError):
        call_grammar(GEMMA, [tool], several=False, token_id=lambda _: None)
