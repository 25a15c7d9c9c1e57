"""Tool calls, several answers and template variables over gRPC: the rules are those of REST."""

import json

import grpc.aio
import pytest
from dspark_proto.v1 import common_pb2, gateway_pb2

from dspark_core.output_rules import GrammarKind
from dspark_core.tokenization.tool_formats import ToolFormat
from tests.integration.gateway.conftest import Serve
from tests.integration.gateway.test_grpc_generate import chat, generate
from tests.integration.gateway.test_tools import (
    ARGUMENTS,
    CALL,
    NATIVE,
    SCHEMA,
    TIME_CALL,
    backend,
    prompt_of,
)

ASK = ("user", "Weather in Paris?")
WEATHER = gateway_pb2.Tool(name="weather", description="Tells the weather.", parameters=json.dumps(SCHEMA))
TOOLS = [WEATHER, gateway_pb2.Tool(name="time")]


async def test_calls_come_in_fragments_with_ids_of_their_own(serve: Serve) -> None:
    running = await serve(backend(f"I look.\n{CALL}\n{TIME_CALL}", chunk_tokens=7))
    chunks = await generate(running, chat(ASK, tools=TOOLS))
    assert "".join(chunk.text for chunk in chunks) == "I look."
    deltas = [delta for chunk in chunks for delta in chunk.tool_calls]
    assert [delta.name for delta in deltas if delta.name] == ["weather", "time"]
    assert len({delta.id for delta in deltas if delta.name}) == 2
    arguments = ["".join(delta.arguments for delta in deltas if delta.index == index) for index in (0, 1)]
    assert arguments == [ARGUMENTS, "{}"]
    assert chunks[-1].finish_reason == common_pb2.FINISH_REASON_STOP
    assert chunks[-1].called
    assert not any(chunk.called for chunk in chunks[:-1])


async def test_forced_calls_of_which_one_breaks_off_do_not_count(serve: Serve) -> None:
    running = await serve(backend(f"{CALL}\n{TIME_CALL}"))
    required = gateway_pb2.TOOL_CHOICE_REQUIRED
    for cut in (14, 5):
        cut_at = len(f"{CALL}\n{TIME_CALL}".encode()) - len(TIME_CALL) + cut
        chunks = await generate(running, chat(ASK, tools=TOOLS, tool_choice=required, max_tokens=cut_at))
        assert "".join(chunk.text for chunk in chunks) == ""
        assert [call.name for chunk in chunks for call in chunk.tool_calls if call.name] == ["weather"]
        assert chunks[-1].finish_reason == common_pb2.FINISH_REASON_LENGTH
        assert not chunks[-1].called


async def test_a_conversation_with_calls_and_their_results_becomes_the_prompt(serve: Serve) -> None:
    answers = backend("It is sunny.")
    running = await serve(answers, tool_format=ToolFormat.LLAMA3_JSON, chat_template=NATIVE)
    message = chat(ASK, tools=TOOLS)
    call = gateway_pb2.ToolCall(id="c1", name="weather", arguments=ARGUMENTS)
    message.messages.append(gateway_pb2.ChatMessage(role="assistant", tool_calls=[call]))
    message.messages.append(gateway_pb2.ChatMessage(role="tool", content="sunny", tool_call_id="c1"))
    chunks = await generate(running, message)
    assert "".join(chunk.text for chunk in chunks) == "It is sunny."
    assert not chunks[-1].called
    prompt = prompt_of(answers.requests[0])
    assert '"name": "weather", "description": "Tells the weather."' in prompt
    assert "sunny" in prompt.split("parameters")[-1]


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": gateway_pb2.TOOL_CHOICE_REQUIRED},
        {"called_tool": "weather"},
        {"allowed_tools": ["weather"]},
        {"allowed_tools": ["weather"], "tool_choice": gateway_pb2.TOOL_CHOICE_REQUIRED},
    ],
)
async def test_a_call_that_is_demanded_or_of_few_is_a_grammar(serve: Serve, fields: dict) -> None:
    answers = backend(CALL)
    chunks = await generate(await serve(answers), chat(ASK, tools=TOOLS, **fields))
    assert answers.requests[0].grammar.kind is GrammarKind.LARK
    assert [delta.name for chunk in chunks for delta in chunk.tool_calls if delta.name] == ["weather"]


async def test_strict_tools_are_a_grammar_of_texts_with_calls(serve: Serve) -> None:
    answers = backend("ok")
    strict = gateway_pb2.Tool(name="weather", parameters=json.dumps(SCHEMA), strict=True)
    await generate(await serve(answers), chat(ASK, tools=[strict]))
    assert "TEXT" in answers.requests[0].grammar.text


async def test_none_may_be_called_where_the_choice_says_so(serve: Serve) -> None:
    running = await serve(backend(CALL))
    chunks = await generate(running, chat(ASK, tools=TOOLS, tool_choice=gateway_pb2.TOOL_CHOICE_NONE))
    assert "".join(chunk.text for chunk in chunks) == CALL
    assert not any(chunk.tool_calls for chunk in chunks)


async def test_several_answers_come_with_their_places_and_seeds(serve: Serve) -> None:
    answers = backend("abc")
    chunks = await generate(await serve(answers), chat(ASK, n=3, seed=7))
    texts = {place: "".join(c.text for c in chunks if c.choice == place) for place in range(3)}
    assert texts == {0: "abc", 1: "abc", 2: "abc"}
    assert sum(chunk.HasField("usage") for chunk in chunks) == 3
    assert len({request.sampling.seed for request in answers.requests}) == 3


async def test_template_variables_reach_the_template(serve: Serve) -> None:
    answers = backend("ok")
    running = await serve(
        answers, chat_template="{{ mood }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    await generate(running, chat(ASK, chat_template_kwargs='{"mood": "gay: "}'))
    assert prompt_of(answers.requests[0]) == "gay: Weather in Paris?"


@pytest.mark.parametrize(
    ("fields", "field", "told"),
    [
        ({"tools": [gateway_pb2.Tool(name="a b")]}, "tools[0].function.name", "1 to 64 letters"),
        (
            {"tools": [gateway_pb2.Tool(name="f", parameters="[1]")]},
            "tools[0].function.parameters",
            "JSON object",
        ),
        ({"tools": [gateway_pb2.Tool(name="f", parameters="{")]}, "tools[0].function.parameters", "be JSON"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "'weather' twice"),
        ({"tools": [WEATHER], "called_tool": "other"}, "tool_choice", "none of the tools"),
        ({"tools": [WEATHER], "allowed_tools": ["other"]}, "tool_choice", "none of the tools"),
        (
            {"tools": [WEATHER], "allowed_tools": ["weather"], "called_tool": "weather"},
            "allowed_tools",
            "called_tool",
        ),
        (
            {
                "tools": [WEATHER],
                "allowed_tools": ["weather"],
                "tool_choice": gateway_pb2.TOOL_CHOICE_NONE,
            },
            "allowed_tools",
            "'none'",
        ),
        ({"tool_choice": gateway_pb2.TOOL_CHOICE_REQUIRED}, "tool_choice", "needs tools"),
        ({"tools": [WEATHER], "tool_choice": 9}, "tool_choice", "got 9"),
        (
            {"tools": [WEATHER], "tool_choice": gateway_pb2.TOOL_CHOICE_NONE, "called_tool": "weather"},
            "called_tool",
            "'none'",
        ),
        ({"tools": [WEATHER], "grammar": common_pb2.Grammar(regex="a+")}, "grammar", "combined with tools"),
        ({"chat_template_kwargs": "7"}, "chat_template_kwargs", "JSON object"),
        ({"chat_template_kwargs": "[" * 5000}, "chat_template_kwargs", "be JSON"),
        ({"n": 0}, "n", ">= 1"),
        ({"n": 1000}, "n", "<= 16"),
    ],
)
async def test_what_is_wrong_names_its_field(serve: Serve, fields: dict, field: str, told: str) -> None:
    running = await serve(backend("ok"))
    with pytest.raises(grpc.aio.AioRpcError, match=told) as caught:
        await generate(running, chat(ASK, **fields))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert ("dspark-field", field) in tuple(caught.value.trailing_metadata())


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        ({"role": "tool", "content": "x"}, "messages[0].tool_call_id"),
        ({"role": "user", "content": "x", "tool_call_id": "c"}, "messages[0].tool_call_id"),
        ({"role": "user", "tool_calls": [gateway_pb2.ToolCall(id="c")]}, "messages[0].tool_calls"),
        ({"role": "robot", "content": "x"}, "messages[0].role"),
    ],
)
async def test_wrong_messages_name_their_field(serve: Serve, entry: dict, field: str) -> None:
    message = gateway_pb2.GatewayGenerateRequest(messages=[gateway_pb2.ChatMessage(**entry)])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(await serve(backend("ok")), message)
    assert ("dspark-field", field) in tuple(caught.value.trailing_metadata())


async def test_tools_need_messages(serve: Serve) -> None:
    message = gateway_pb2.GatewayGenerateRequest(prompt="p", tools=TOOLS)
    with pytest.raises(grpc.aio.AioRpcError, match="tools needs messages, got prompt"):
        await generate(await serve(backend("ok")), message)
