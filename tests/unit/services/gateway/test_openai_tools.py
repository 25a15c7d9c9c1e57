"""Tools in request bodies: what they mean, and that errors name what is wrong."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from dspark_core.errors import InvalidRequestError
from services.gateway.http.errors import invalid_body
from services.gateway.openai.schema import ChatCompletionBody
from services.gateway.requests import ChatRole, TextRequest
from services.gateway.tools.tools import Tool, ToolCall, ToolUse

USER = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells it.", "parameters": SCHEMA, "strict": True},
}
TIME = {"type": "function", "function": {"name": "time"}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "x"}'}}
NAMED = {"type": "function", "function": {"name": "time"}}


def chat(**fields: object) -> TextRequest:
    text = json.dumps({"model": "m", "messages": [USER], **fields})
    try:
        return ChatCompletionBody.model_validate_json(text).to_request("id")
    except ValidationError as error:
        raise invalid_body(error) from error


def test_tools_arrive() -> None:
    use = chat(tools=[WEATHER, TIME]).tools
    assert use == ToolUse(
        tools=(
            Tool(name="weather", description="Tells it.", parameters=SCHEMA, strict=True),
            Tool(name="time"),
        )
    )
    assert json.loads(use.tools[1].schema) == {
        "type": "object",
        "properties": {},
        "additionalProperties": False,
    }
    assert use.tools[0].declared["function"] == {
        "name": "weather",
        "description": "Tells it.",
        "parameters": SCHEMA,
    }


@pytest.mark.parametrize(
    ("fields", "forced"),
    [
        ({}, []),
        ({"tool_choice": "auto"}, []),
        ({"tool_choice": "required"}, [0, 1]),
        ({"tool_choice": NAMED}, [1]),
    ],
)
def test_the_choice_says_what_has_to_be_called(fields, forced) -> None:
    assert list(chat(tools=[WEATHER, TIME], **fields).tools.forced) == forced


def test_nothing_may_be_called_where_nothing_is_to_be() -> None:
    for fields in ({}, {"tools": []}, {"tools": None}, {"tools": [WEATHER], "tool_choice": "none"}):
        assert chat(**fields).tools is None


def test_streams_hear_of_calls_before_they_are_whole() -> None:
    assert chat(tools=[TIME], stream=True, parallel_tool_calls=False).tools == ToolUse(
        tools=(Tool(name="time"),), eager=True, parallel=False
    )


def test_calls_and_their_results_come_back() -> None:
    echoed = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "rain"}]}
    _, calling, told = chat(messages=[USER, echoed, result]).prompt.messages
    assert (calling.role, calling.content) == (ChatRole.ASSISTANT, "")
    assert calling.tool_calls == (ToolCall(call_id="call_1", name="weather", arguments='{"city": "x"}'),)
    assert (told.role, told.content, told.tool_call_id) == (ChatRole.TOOL, "rain", "call_1")


def test_what_clients_add_to_calls_they_send_back_says_nothing_new() -> None:
    """The `openai` client's helpers add parsed arguments, and the index of a streamed call."""
    called = {**CALL["function"], "parsed_arguments": {"city": "x"}}  # type: ignore[dict-item]
    answer = {"role": "assistant", "content": None, "tool_calls": [{**CALL, "index": 0, "function": called}]}
    plain = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert chat(messages=[USER, answer, USER]).prompt == chat(messages=[USER, plain, USER]).prompt


def test_a_schema_is_known_without_what_only_describes_it() -> None:
    names = {"description": {"type": "string", "title": "T"}, "enum": {"enum": ["title", {"title": 1}]}}
    schema = {
        "title": "T",
        "properties": names,
        "anyOf": [{"required": ["enum"], "$comment": "c"}, {"const": {"default": 1}}],
        "$defs": {"examples": {"default": 0, "items": {"description": "d", "type": "null"}}},
    }
    assert json.loads(Tool(name="t", parameters=schema).schema) == {
        "type": "object",
        "properties": {"description": {"type": "string"}, "enum": {"enum": ["title", {"title": 1}]}},
        "anyOf": [{"required": ["enum"]}, {"const": {"default": 1}}],
        "$defs": {"examples": {"items": {"type": "null"}}},
    }


def test_a_tool_is_measured_by_characters() -> None:
    Tool(name="t", description="说" * 60_000)
    with pytest.raises(InvalidRequestError, match="got 70"):
        Tool(name="t", description="说" * 70_000)


def function(**fields: object) -> list[dict[str, object]]:
    return [{"type": "function", "function": {"name": "f", **fields}}]


JSON_FORMAT = {"type": "json_object"}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function", "required but missing"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "got 'web_search'"),
        (
            {"tools": function(name="a b")},
            "tools[0].function.name",
            "1 to 64 letters, digits, - or _, got 'a b'",
        ),
        ({"tools": function(name="x" * 65)}, "tools[0].function.name", "1 to 64"),
        ({"tools": function(name="")}, "tools[0].function.name", "got ''"),
        ({"tools": function(parameters=[])}, "tools[0].function.parameters", "got []"),
        ({"tools": function(parameters={"type": "array"})}, "tools[0].function.parameters", "got 'array'"),
        (
            {"tools": function(description="x" * 66_000)},
            "tools[0].function.parameters",
            "<= 65536 characters",
        ),
        ({"tools": function(returns={})}, "tools[0].function.returns", "unrecognised"),
        ({"tools": [TIME, TIME]}, "tools", "names of their own, got 'time' twice"),
        (
            {"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]},
            "tools",
            "got 129",
        ),
        ({"tools": [TIME], "tool_choice": "sometimes"}, "tool_choice.type", "got 'sometimes'"),
        ({"tools": [TIME], "tool_choice": "function"}, "tool_choice", "got 'function'"),
        ({"tools": [TIME], "tool_choice": {"type": "function"}}, "tool_choice", "needs a function"),
        (
            {"tools": [TIME], "tool_choice": {"type": "auto", "function": {"name": "time"}}},
            "tool_choice",
            "cannot have a function",
        ),
        ({"tools": [WEATHER], "tool_choice": NAMED}, "tool_choice", "'time', which is none of the tools"),
        ({"tool_choice": "required"}, "tool_choice", "'required' needs tools"),
        ({"tool_choice": NAMED, "tools": []}, "tool_choice", "'function' needs tools"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls", "got 'yes'"),
        ({"functions": [{}]}, "functions", "not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "'high' is not supported"),
        ({"verbosity": "low"}, "verbosity", "'low' is not supported"),
        ({"function_call": {"name": "f"}}, "function_call", "not supported"),
        (
            {"tools": [TIME], "tool_choice": NAMED, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "demands a call",
        ),
        (
            {"tools": [TIME], "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "response_format can",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "is required"),
        (
            {"messages": [USER, {"role": "user", "content": "x", "tool_call_id": "c"}]},
            "messages[1].tool_call_id",
            "belongs to messages of role 'tool'",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]},
            "messages[0].tool_calls",
            "belong to messages of the assistant",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "type": "function"}]}]},
            "messages[0].tool_calls[0].function",
            "required but missing",
        ),
        (
            {"messages": [{"role": "tool", "tool_call_id": "c"}]},
            "messages[0].content",
            "required but missing",
        ),
    ],
)
def test_what_is_wrong_is_named(fields, param, message) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(**fields)
    assert caught.value.field == param
    assert message in str(caught.value)


def test_a_format_goes_together_with_tools_that_may_be_called() -> None:
    request = chat(tools=[TIME], response_format=JSON_FORMAT)
    assert request.tools is not None
    assert request.grammar is not None
    chat(tools=[TIME], tool_choice="none", structured_outputs={"regex": "a"})


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_format_means_nothing_where_a_call_is_forced(choice) -> None:
    forced = {"tools": [TIME], "tool_choice": choice}
    assert chat(**forced, response_format=JSON_FORMAT) == chat(**forced)
