"""Requests with very many small items, valid or not, are refused before each item costs work."""

import gc
import json
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from dspark_proto.v1 import gateway_pb2
from pydantic import ValidationError

from dspark_core.errors import InvalidRequestError
from services.common.convert import adjustments_from_proto
from services.gateway import proto_convert
from services.gateway.http.body import MOST_CONTAINERS, parsed_body
from services.gateway.http.errors import invalid_body
from services.gateway.openai import schema
from services.gateway.openai.responses_schema import ResponsesBody
from services.gateway.openai.schema import ChatCompletionBody, CompletionBody
from services.gateway.requests import ChatRole
from services.gateway.tools.tools import MAX_TOOLS

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "add"}}


def refusal(**fields: Any) -> tuple[int, InvalidRequestError]:
    """How many problems were found, and the error for the client."""
    body = {"model": "m", "messages": [USER], **fields}
    with pytest.raises(ValidationError) as caught:
        ChatCompletionBody.model_validate_json(json.dumps(body))
    return caught.value.error_count(), invalid_body(caught.value)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"messages": [USER, *[0] * 1000]}, "messages[1]"),
        ({"stop": [0] * 1000}, "stop[0]"),
        ({"tools": [0] * 1000}, "tools[0]"),
        ({"messages": [{**USER, "tool_calls": [0] * 1000}]}, "messages[0].tool_calls[0]"),
        ({"messages": [{**USER, "annotations": [0] * 1000}]}, "messages[0].annotations[0]"),
        ({"structured_outputs": {"choice": [0] * 1000}}, "structured_outputs.choice[0]"),
    ],
)
def test_a_list_is_looked_at_up_to_its_first_wrong_item(fields, field) -> None:
    problems, error = refusal(**fields)
    assert problems == 1
    assert error.field == field
    assert str(error).startswith(f"{field}: Input should be ")
    assert str(error).endswith(", got 0")


def test_a_few_unknown_fields_are_named_and_very_many_are_counted() -> None:
    problems, error = refusal(**{f"x{index}": 0 for index in range(100)})
    assert (problems, error.field) == (100, "x0")
    assert str(error) == "unrecognised request argument: x0"
    problems, error = refusal(**{f"x{index}": 0 for index in range(101)})
    assert (problems, error.field) == (101, None)
    assert str(error) == "the request body is wrong in 101 places, too many to name them"


@pytest.mark.parametrize("unit", ["[]", "{}"])
def test_a_body_of_very_many_small_values_is_not_read(unit: str) -> None:
    raw = b'{"model": "m", "x": [%s]}' % b",".join([unit.encode()] * MOST_CONTAINERS)
    with pytest.raises(InvalidRequestError, match=r"at most 32768 arrays and objects, got 32770$"):
        parsed_body(raw, SimpleNamespace)


@pytest.mark.parametrize("text", ["[{" * 40_000, '"[' * 40_000, "\\{" * 40_000, '\\"[' * 40_000, '[\\"'])
def test_brackets_in_texts_do_not_count(text: str) -> None:
    fields = {"model": "m", "messages": [{"role": "user", "content": text}] * 2}
    body = parsed_body(json.dumps(fields).encode(), ChatCompletionBody)
    assert [message.content for message in body.messages] == [text] * 2


def test_messages_are_bounded_in_number() -> None:
    problems, error = refusal(messages=[USER] * 5000)
    assert (problems, error.field) == (1, "messages")
    assert str(error) == "messages must hold at most 4096 items, got 5000"
    most = ChatCompletionBody.model_validate({"model": "m", "messages": [USER] * 4096}).to_request("id")
    assert len(most.prompt.messages) == 4096


def refused(message: gateway_pb2.GatewayGenerateRequest) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        proto_convert.request_from_proto(message, "id", "m")
    return caught.value


def test_messages_by_grpc_are_counted_before_they_are_read(monkeypatch) -> None:
    monkeypatch.setattr(proto_convert, "_message", None)
    message = gateway_pb2.GatewayGenerateRequest(messages=[gateway_pb2.ChatMessage(role="user")] * 4097)
    error = refused(message)
    assert (error.field, str(error)) == ("messages", "messages must hold at most 4096 items, got 4097")


def test_plain_messages_by_grpc_cost_no_validation(monkeypatch) -> None:
    monkeypatch.setattr(proto_convert, "ChatMessageBody", None)
    given = [("developer", "a"), ("system", "b"), ("user", ""), ("assistant", "c")]
    messages = [gateway_pb2.ChatMessage(role=role, content=content) for role, content in given]
    message = gateway_pb2.GatewayGenerateRequest(messages=messages)
    prompt = proto_convert.request_from_proto(message, "id", "m").prompt
    assert [(entry.role, entry.content) for entry in prompt.messages] == [
        (ChatRole.SYSTEM, "a"),
        (ChatRole.SYSTEM, "b"),
        (ChatRole.USER, ""),
        (ChatRole.ASSISTANT, "c"),
    ]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"role": "robot"}, "messages[0].role"),
        ({"role": "tool"}, "messages[0].tool_call_id"),
        ({"role": "user", "tool_call_id": "x"}, "messages[0].tool_call_id"),
        ({"role": "developer", "tool_calls": [gateway_pb2.ToolCall(name="f")]}, "messages[0].tool_calls"),
    ],
)
def test_what_is_wrong_about_a_message_by_grpc_is_still_named(fields, field) -> None:
    message = gateway_pb2.GatewayGenerateRequest(messages=[gateway_pb2.ChatMessage(**fields)])
    assert refused(message).field == field


FLAT_TOOL = {"type": "function", "name": "add"}


@pytest.mark.parametrize(
    ("body_type", "fields", "field", "most"),
    [
        (ChatCompletionBody, {"tools": [TOOL] * 1000}, "tools", 128),
        (ResponsesBody, {"tools": [FLAT_TOOL] * 1000}, "tools", 128),
        (
            ChatCompletionBody,
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": [TOOL] * 1000},
                }
            },
            "tool_choice.allowed_tools.tools",
            128,
        ),
        (
            ResponsesBody,
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [FLAT_TOOL] * 1000}},
            "tool_choice.tools",
            128,
        ),
        (
            ResponsesBody,
            {"input": [{"type": "reasoning", "content": [{"type": "reasoning_text", "text": ""}] * 5000}]},
            "input[0].content",
            4096,
        ),
        (
            ChatCompletionBody,
            {"structured_outputs": {"choice": ["a"] * 20_000}},
            "structured_outputs.choice",
            16_384,
        ),
    ],
)
def test_lists_are_counted_before_the_rest_of_their_items_is_read(body_type, fields, field, most) -> None:
    needed = {"input": "hi"} if body_type is ResponsesBody else {"messages": [USER]}
    with pytest.raises(InvalidRequestError) as caught:
        parsed_body(json.dumps({"model": "m", **needed, **fields}).encode(), body_type)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field} must hold at most {most} items, got ")


def test_prompts_are_counted_before_their_tokens_are_checked(monkeypatch) -> None:
    monkeypatch.setattr(schema, "_check_token_ids", None)
    with pytest.raises(InvalidRequestError) as caught:
        parsed_body(b'{"model": "m", "prompt": [%b[1]]}' % (b"[1]," * 5000), CompletionBody)
    assert (caught.value.field, str(caught.value)) == (
        "prompt",
        "prompt must hold at most 1024 items, got 5001",
    )


def test_garbage_is_not_looked_for_among_the_items_of_a_body() -> None:
    looked_for = 0

    def count(phase: str, _: object) -> None:
        nonlocal looked_for
        looked_for += phase == "start"

    gc.callbacks.append(count)
    try:
        with pytest.raises(InvalidRequestError):
            parsed_body(b'{"model": "m", "prompt": [%b[1]]}' % (b"[1]," * 100_000), CompletionBody)
    finally:
        gc.callbacks.remove(count)
    assert gc.isenabled()
    assert looked_for <= 2


def test_tools_by_grpc_are_counted_before_they_are_read(monkeypatch) -> None:
    expected = f"tools must be of 1 to {MAX_TOOLS} tools, got {MAX_TOOLS + 1} tools"
    monkeypatch.setattr(proto_convert, "ToolBody", None)
    tools = [gateway_pb2.Tool(name="add")] * (MAX_TOOLS + 1)
    messages = [gateway_pb2.ChatMessage(role="user", content="hi")]
    error = refused(gateway_pb2.GatewayGenerateRequest(messages=messages, tools=tools))
    assert (error.field, str(error)) == ("tools", expected)


def test_biases_are_counted_before_they_are_read() -> None:
    body = {"model": "m", "messages": [USER], "logit_bias": {f"x{index}": 0 for index in range(2000)}}
    with pytest.raises(InvalidRequestError) as caught:
        ChatCompletionBody.model_validate(body).to_request("id")
    assert caught.value.field == "logit_bias"
    assert str(caught.value) == "logit_bias must be of <= 1024 tokens, got 2000 tokens"


def test_calls_of_tools_are_bounded_in_number_over_all_messages(monkeypatch) -> None:
    called = {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "add", "arguments": ""}}]}
    body = {"model": "m", "messages": [USER, *[{**called, "tool_calls": called["tool_calls"] * 41}] * 100]}
    with pytest.raises(InvalidRequestError, match="at most 4096 calls of tools, got 4100") as caught:
        ChatCompletionBody.model_validate(body).to_request("id")
    assert caught.value.field == "messages"

    def never(*_: object) -> None:
        raise AssertionError("built before their number was looked at")

    monkeypatch.setattr(proto_convert.ToolCallBody, "model_validate", never)
    one = gateway_pb2.ChatMessage(role="assistant", tool_calls=[gateway_pb2.ToolCall()] * 41)
    with pytest.raises(InvalidRequestError, match="at most 4096 calls of tools, got 4100") as caught:
        proto_convert.request_from_proto(gateway_pb2.GatewayGenerateRequest(messages=[one] * 100), "id", "m")
    assert caught.value.field == "messages"


def test_biases_by_grpc_are_counted_before_they_are_read() -> None:
    class Unread(list[object]):
        def __iter__(self) -> NoReturn:
            raise AssertionError("read before their number was looked at")

    with pytest.raises(InvalidRequestError, match="logit_bias must be of <= 1024 tokens, got 1025 tokens"):
        adjustments_from_proto(SimpleNamespace(logit_bias=Unread([None] * 1025)))
