"""Bodies of the Responses API: what they mean, and that refusals name the field."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from dspark_core.errors import InvalidRequestError
from dspark_core.output_rules import GrammarKind
from services.gateway.http.errors import invalid_body
from services.gateway.openai.responses_schema import ResponsesBody
from services.gateway.openai.schema import ChatCompletionBody
from services.gateway.requests import MAX_MESSAGES, ChatMessage, ChatRole, TextRequest
from services.gateway.tools.tools import Tool, ToolCall, ToolUse

USER = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}
TIME = {"type": "function", "name": "time", "description": None}
CALL = {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "time", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "noon"}
SAID = {
    "type": "message",
    "id": "msg_1",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}],
}


def respond(**fields: object) -> TextRequest:
    text = json.dumps({"model": "m", "input": "hi", **fields})
    try:
        return ResponsesBody.model_validate_json(text).to_request("id")
    except ValidationError as error:
        raise invalid_body(error) from error


def messages(*items: object, **fields: object) -> list[tuple[ChatRole, str, tuple[str, ...]]]:
    said = respond(input=items, **fields).prompt.messages
    return [
        (message.role, message.content, tuple(call.name for call in message.tool_calls)) for message in said
    ]


def test_it_is_a_chat_request_in_other_words() -> None:
    same = {
        "temperature": 0.3,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "seed": -7,
        "stop": ["x"],
        "stream": True,
        "stream_options": {"include_obfuscation": False},
        "speculation": {"enabled": False},
        "min_tokens_per_second": 3,
        "min_tokens": 2,
        "logit_bias": {"5": 1},
        "presence_penalty": 1,
        "repetition_penalty": 1.5,
        "ignore_eos": True,
        "chat_template_kwargs": {"enable_thinking": False},
        "parallel_tool_calls": False,
        "user": "u",
        "store": True,
        "service_tier": "auto",
    }
    schema = {"name": "n", "schema": SCHEMA, "strict": True}
    function = {name: value for name, value in WEATHER.items() if name != "type"}
    chat = {
        **same,
        "model": "m",
        "messages": [{"role": "system", "content": "be brief"}, USER],
        "max_tokens": 9,
        "response_format": {"type": "json_schema", "json_schema": schema},
        "tools": [{"type": "function", "function": function}],
    }
    asked = respond(
        **same,
        instructions="be brief",
        max_output_tokens=9,
        text={"format": {"type": "json_schema", **schema}},
        tools=[WEATHER],
    )
    expected = ChatCompletionBody.model_validate_json(json.dumps(chat)).to_request("id")
    assert asked.prompt.messages == expected.prompt.messages
    assert asked.grammar.kind is GrammarKind.JSON_SCHEMA
    assert (asked.grammar_field, asked.prompt.field) == ("text.format", "input")
    assert {**fields_of(asked), "grammar_field": "", "prompt": None} == {
        **fields_of(expected),
        "grammar_field": "",
        "prompt": None,
    }


def fields_of(request: TextRequest) -> dict[str, object]:
    return {name: getattr(request, name) for name in TextRequest.__slots__}


def test_fields_that_ask_for_nothing_are_accepted() -> None:
    request = respond(
        instructions=None,
        include=["reasoning.encrypted_content"],
        metadata={"a": "b"},
        tools=[],
        tool_choice="none",
        text={"format": {"type": "text"}, "verbosity": "medium"},
        reasoning={"effort": None, "summary": None},
        previous_response_id=None,
        background=False,
        truncation="disabled",
        context_management=[],
        max_tool_calls=3,
        prompt_cache_key="k",
        prompt_cache_retention="24h",
        top_logprobs=0,
    )
    assert fields_of(request) == fields_of(respond())


def test_items_become_messages() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    assert messages(
        {"role": "developer", "content": "x"},
        {"type": "message", "role": "user", "content": parts, "id": None, "status": None},
        SAID,
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "?"},
        {**CALL, "async_": None, "caller": None, "namespace": None, "status": "completed"},
        {**OUTPUT, "output": [{"type": "input_text", "text": "noon"}]},
        instructions="first",
    ) == [
        (ChatRole.SYSTEM, "first", ()),
        (ChatRole.SYSTEM, "x", ()),
        (ChatRole.USER, "ab", ()),
        (ChatRole.ASSISTANT, "I look.", ("time",)),
        (ChatRole.TOOL, "noon", ()),
    ]
    *_, calling, told = respond(input=[USER, CALL, OUTPUT]).prompt.messages
    assert calling.tool_calls == (ToolCall(call_id="c1", name="time", arguments="{}"),)
    assert told == ChatMessage(role=ChatRole.TOOL, content="noon", tool_call_id="c1")


def test_refusals_of_earlier_answers_are_what_was_said() -> None:
    refused = {**SAID, "content": [{"type": "refusal", "refusal": "I won't."}]}
    assert messages(USER, refused)[1] == (ChatRole.ASSISTANT, "I won't.", ())


def test_a_thought_belongs_to_the_answer_after_it() -> None:
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "status": "completed"}
    told = {**thought, "content": [{"type": "reasoning_text", "text": "Hm."}]}
    asked = respond(input=[USER, told, SAID, thought, CALL, OUTPUT, told, CALL, OUTPUT, told, USER, SAID])
    assistant = [one for one in asked.prompt.messages if one.role is ChatRole.ASSISTANT]
    assert [one.reasoning for one in assistant] == ["Hm.", "Hm.", ""]
    assert [len(one.tool_calls) for one in assistant] == [1, 1, 0]


def test_what_the_assistant_says_and_calls_in_one_answer_is_one_message() -> None:
    assistant = ChatRole.ASSISTANT
    assert messages(SAID, CALL, CALL, SAID) == [(assistant, "I look.I look.", ("time", "time"))]
    assert messages(CALL, OUTPUT, CALL, OUTPUT)[::2] == [(assistant, "", ("time",))] * 2
    assert messages(SAID, SAID) == [(assistant, "I look.", ())] * 2
    assert messages(CALL, USER, SAID)[::2] == [(assistant, "", ("time",)), (assistant, "I look.", ())]


def test_tools_arrive() -> None:
    assert respond(tools=[WEATHER, TIME], stream=True).tools == ToolUse(
        tools=(Tool(name="weather", parameters=SCHEMA, strict=True), Tool(name="time")), eager=True
    )
    named = respond(tools=[WEATHER, TIME], tool_choice={"type": "function", "name": "time"})
    assert list(named.tools.forced) == [1]
    assert list(respond(tools=[WEATHER], tool_choice="required").tools.forced) == [0]
    assert respond(tools=[WEATHER], tool_choice="none").tools is None
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "time"}]}
    assert list(respond(tools=[WEATHER, TIME], tool_choice=allowed).tools.forced) == [1]
    may = respond(tools=[WEATHER, TIME], tool_choice={**allowed, "mode": "auto"}).tools
    assert (list(may.callable), may.forced, may.bounded) == ([1], {}, True)


def test_a_format_means_nothing_where_a_call_is_forced() -> None:
    """Instructor sends its schema as the only tool, and as the format too."""
    forced = {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "weather"}}
    schema = {"type": "json_schema", "name": "weather", "schema": SCHEMA}
    assert fields_of(respond(**forced, text={"format": schema})) == fields_of(respond(**forced))


def test_logprobs_are_included_on_request() -> None:
    include = ["message.output_text.logprobs"]
    assert respond().top_logprobs is None
    assert respond(include=include).top_logprobs == 0
    assert respond(include=include, top_logprobs=4).top_logprobs == 4


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": None}, "input", "got None"),
        ({"input": []}, "input", "at least one message"),
        ({"input": [USER] * (MAX_MESSAGES + 1)}, "input", "at most 4096 items, got 4097"),
        ({"input": [USER] * MAX_MESSAGES, "instructions": "x"}, "input", "at most 4096 items, got 4097"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "got 'tool'"),
        ({"input": [{"role": "user", "content": None}]}, "input[0].content", "required but missing"),
        ({"input": [{**USER, "name": "x"}]}, "input[0].name", "unrecognised"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content",
            "part 0 must be of type 'input_text' or 'output_text' or 'refusal', got 'input_image'",
        ),
        ({"input": [USER, {"type": "item_reference", "id": "msg_1"}]}, "input[1]", "nothing is stored here"),
        ({"input": [{"type": "web_search_call"}]}, "input[0]", "got {'type': 'web_search_call'}"),
        ({"input": [{"type": "function_call", "name": "x"}]}, "input[0].call_id", "required"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "keeps no state"),
        ({"previous_response_id": "resp_1", "input": []}, "previous_response_id", "keeps no state"),
        ({"conversation": {"id": "conv_1"}}, "conversation", "keeps no state"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "keeps no state"),
        ({"background": True}, "background", "keeps no state"),
        ({"truncation": "auto"}, "truncation", "send 'disabled'"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "'high'} is not supported"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "got 'web_search'"),
        ({"tools": [{**TIME, "name": "é"}]}, "tools[0].name", "letters"),
        ({"tools": [{**TIME, "parameters": {"type": "array"}}]}, "tools[0].parameters", "got 'array'"),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        (
            {"tools": [TIME], "tool_choice": {"type": "allowed_tools", "tools": []}},
            "tool_choice",
            "allowed",
        ),
        ({"tools": [TIME], "tool_choice": {"type": "function"}}, "tool_choice", "needs a function"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format", "needs a schema"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "got 'low'"),
        ({"structured_outputs": {"regex": "a"}, "tools": [TIME]}, "structured_outputs", "text.format can"),
        (
            {"structured_outputs": {"regex": "a"}, "text": {"format": {"type": "json_object"}}},
            "structured_outputs",
            "text.format and structured_outputs contradict",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens", "got 0"),
        ({"max_tokens": 3}, "max_tokens", "unrecognised"),
        ({"top_logprobs": 2}, "top_logprobs", "in include"),
        (
            {"include": ["message.output_text.logprobs"], "tools": [TIME]},
            "include",
            "cannot be combined with tools",
        ),
        ({"include": ["everything"]}, "include[0]", "got 'everything'"),
        ({"metadata": {"a": 1}}, "metadata.a", "got 1"),
        ({"stream_options": {}}, "stream_options", "when stream is true"),
    ],
)
def test_what_is_refused_is_named(fields, param, message) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        respond(**fields)
    assert message in str(refused.value)
    assert refused.value.field == param
