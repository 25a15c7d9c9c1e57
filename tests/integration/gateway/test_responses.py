"""The Responses API through the official client: answers whole, as events, and failing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from dspark_core.errors import UnavailableError
from dspark_core.records import SamplingParams, SpeculationOptions
from services.common.lifecycle import end
from services.gateway.callers.tiers import Tier
from services.gateway.config import GatewayLimits
from services.gateway.http import app
from tests.integration.gateway.conftest import MODEL, RunningGateway, Serve
from tests.integration.gateway.test_tools import (
    ARGUMENTS,
    CALL,
    SCHEMA,
    TIME_CALL,
    allows,
    backend,
    prompt_of,
)
from tests.support.byte_tokenizer import END, START
from tests.support.fake_generation import FakeBackend
from tests.support.loop_clock import LoopClock
from tests.support.polling import eventually
from tests.support.thinking_templates import QWEN3

ASK = {"model": MODEL, "input": "hi"}
TEXT = "Grüße, 世界! 🙂 done"
WEATHER = {"type": "function", "name": "weather", "description": "Tells it.", "parameters": SCHEMA}
TOOLS = [WEATHER, {"type": "function", "name": "time"}]
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


async def whole(running: RunningGateway, **fields: Any) -> Response:
    """Validates the answer strictly against its official type."""
    answer = await running.client.post("/v1/responses", json={**ASK, **fields})
    assert answer.status_code == 200, answer.text
    return Response.model_validate_json(answer.text, strict=True)


async def events(
    running: RunningGateway, *, once_begun: Callable[[], Awaitable[None]] | None = None, **fields: Any
) -> list[Any]:
    """Validates the events likewise, and their framing on the wire."""
    async with running.client.stream(
        "POST", "/v1/responses", json={**ASK, "stream": True, **fields}
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-request-id"].startswith("resp_")
        if once_begun is not None:
            await once_begun()
        text = (await answer.aread()).decode()
    frames = [frame.split("\n") for frame in text.removesuffix("\n\n").split("\n\n")]
    told = [EVENT.validate_json(data.removeprefix("data: "), strict=True) for _, data in frames]
    assert [name for name, _ in frames] == [f"event: {event.type}" for event in told]
    assert [event.sequence_number for event in told] == list(range(len(told)))
    return told


def without_ids(response: Response) -> list[dict[str, Any]]:
    return [item.model_dump(exclude={"id", "call_id"}) for item in response.output]


async def test_a_whole_answer_is_complete(serve: Serve) -> None:
    fake = FakeBackend(TEXT)
    running = await serve(fake)
    answer = await whole(running, metadata={"a": "b"}, instructions="be brief", temperature=0.5, store=True)
    assert answer.id.startswith("resp_")
    assert (answer.object, answer.model, answer.status) == ("response", MODEL, "completed")
    (message,) = answer.output
    assert (message.role, message.status) == ("assistant", "completed")
    assert message.id.startswith("msg_")
    assert answer.output_text == TEXT
    tokens = len(TEXT.encode()) + 1
    prompt = (START, *b"system\nbe brief", END, START, *b"user\nhi", END, START, *b"assistant\n")
    assert fake.requests[0].prompt_token_ids == prompt
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(prompt), tokens)
    assert answer.usage.total_tokens == len(prompt) + tokens
    assert (answer.metadata, answer.instructions, answer.temperature) == ({"a": "b"}, "be brief", 0.5)
    assert (answer.tools, answer.tool_choice, answer.parallel_tool_calls) == ([], "auto", True)
    assert answer.model_extra["store"] is False
    assert answer.model_extra["speculation"]["rounds"] == -(-tokens // 3)
    assert answer.model_extra["system_fingerprint"].startswith("fp_")


async def test_requests_are_told_by_their_id_and_counted(serve: Serve) -> None:
    running = await serve(FakeBackend("ok"))
    answer = await running.client.post("/v1/responses", json=ASK)
    assert answer.headers["x-request-id"] == answer.json()["id"]
    counted = 'dspark_gateway_http_requests_total{code="200",route="/v1/responses"}'
    assert await running.metric(counted) == f"{counted} 1.0"


@pytest.mark.parametrize("chunk_tokens", [1, 2, 100])
async def test_a_stream_tells_of_every_step(serve: Serve, chunk_tokens) -> None:
    running = await serve(FakeBackend(TEXT, chunk_tokens=chunk_tokens))
    told = await events(running)
    kinds = [event.type for event in told]
    deltas = kinds.count("response.output_text.delta")
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    pieces = [event.delta for event in told if event.type == "response.output_text.delta"]
    assert "".join(pieces) == TEXT == told[-4].text == told[-3].part.text
    assert not any("\ufffd" in piece for piece in pieces)
    assert (told[0].response.status, told[0].response.output) == ("in_progress", [])
    last = told[-1].response
    assert last.output == [told[-2].item]
    assert last.output_text == TEXT
    assert last.usage.output_tokens == len(TEXT.encode()) + 1
    assert last.model_extra["speculation"]["rounds"] > 0
    assert {event.response.id for event in told if hasattr(event, "response")} == {last.id}
    assert {event.item_id for event in told if hasattr(event, "item_id")} == {last.output[0].id}


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_is_cut_off_is_incomplete(serve: Serve, stream) -> None:
    running = await serve(FakeBackend("abcdef"))
    fields = {"max_output_tokens": 4}
    if stream:
        last = (await events(running, **fields))[-1]
        assert last.type == "response.incomplete"
        answer = last.response
    else:
        answer = await whole(running, **fields)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (answer.output_text, answer.output[0].status) == ("abcd", "incomplete")
    assert answer.max_output_tokens == 4


@pytest.mark.parametrize("chunk_tokens", [1, 4, 500])
async def test_what_an_answer_consists_of_does_not_depend_on_its_pieces(serve: Serve, chunk_tokens) -> None:
    said = f"I look.\n{CALL}\n{TIME_CALL}\nThen I tell."
    running = await serve(backend(said, chunk_tokens=chunk_tokens))
    told = await events(running, tools=TOOLS)
    streamed, answer = told[-1].response, await whole(running, tools=TOOLS)
    assert without_ids(streamed) == without_ids(answer)
    first, weather, time, last = answer.output
    assert (first.content[0].text, last.content[0].text) == ("I look.", "\nThen I tell.")
    assert (weather.name, weather.arguments, weather.status) == ("weather", ARGUMENTS, "completed")
    assert (time.name, time.arguments) == ("time", "{}")
    assert weather.call_id.startswith("call_")
    assert len({item.id for item in answer.output} | {weather.call_id, time.call_id}) == 6
    assert [event.item for event in told if event.type == "response.output_item.done"] == streamed.output
    fragments = {1: "", 2: ""}
    for event in told:
        if event.type == "response.function_call_arguments.delta":
            fragments[event.output_index] += event.delta
    assert fragments == {1: ARGUMENTS, 2: "{}"}
    done = [event.arguments for event in told if event.type == "response.function_call_arguments.done"]
    assert done == [ARGUMENTS, "{}"]


async def test_a_call_that_breaks_off_is_an_incomplete_item(serve: Serve) -> None:
    running = await serve(backend(f"I look. {CALL}"))
    answer = (await events(running, tools=TOOLS, max_output_tokens=70))[-1].response
    text, call = answer.output
    assert (answer.status, text.status, call.status) == ("incomplete", "completed", "incomplete")
    assert ARGUMENTS.startswith(call.arguments)


async def test_a_forced_call_that_breaks_off_is_never_a_text(serve: Serve) -> None:
    running = await serve(backend(CALL))
    kinds = set()
    for most in range(1, 70, 3):
        fields: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "max_output_tokens": most}
        streamed = (await events(running, **fields))[-1].response
        for answer in (streamed, await whole(running, **fields)):
            (item,) = answer.output
            whole_call = getattr(item, "arguments", "") == ARGUMENTS
            assert (answer.status, answer.output_text) == ("incomplete", "")
            assert item.status == ("completed" if whole_call else "incomplete")
            kinds.add(item.type)
    assert kinds == {"message", "function_call"}


async def test_an_empty_answer_is_an_empty_message(serve: Serve) -> None:
    running = await serve(FakeBackend(""))
    assert (await whole(running)).output[0].content[0].text == ""
    assert (await events(running))[-1].response.output_text == ""


async def test_the_conversation_goes_on_with_what_was_called(serve: Serve) -> None:
    fake = backend(f"I look.\n{CALL}")
    running = await serve(fake)
    create = running.openai.responses.create
    items: list[Any] = [{"role": "user", "content": "Weather in Paris?"}]
    answer = await create(model=MODEL, input=items, tools=TOOLS)
    items += answer.output
    items.append({"type": "function_call_output", "call_id": answer.output[1].call_id, "output": "rain"})
    await create(model=MODEL, input=items, tools=TOOLS)
    await create(
        model=MODEL, input=[json.loads(item.model_dump_json()) for item in answer.output], tools=TOOLS
    )
    first, second, _ = (prompt_of(request) for request in fake.requests)
    # The first turn's prompt is a prefix of the second's, so the prefix cache has it.
    assert second == f"{first}I look.\n{CALL}user\n<tool_response>\nrain\n</tool_response>assistant\n"


async def test_the_clients_helpers_read_answers(serve: Serve) -> None:
    class Weather(BaseModel):
        city: str

    fake = FakeBackend('{"city": "x"}')
    running = await serve(fake)
    parsed = await running.openai.responses.parse(model=MODEL, input="hi", text_format=Weather)
    assert parsed.output_parsed == Weather(city="x")
    assert allows(fake.requests[0], '{"city": "x"}')
    assert not allows(fake.requests[0], '{"town": "x"}')
    assert parsed.text.format.name == "Weather"
    async with running.openai.responses.stream(model=MODEL, input="hi", text_format=Weather) as stream:
        kinds = [event.type async for event in stream]
        assert (await stream.get_final_response()).output_parsed == Weather(city="x")
    assert kinds[0] == "response.created"
    again = [{"role": "user", "content": "hi"}, *parsed.output]
    await running.openai.responses.create(model=MODEL, input=again)


async def test_required_calls_are_parsed_by_the_clients_helpers(serve: Serve) -> None:
    class Weather(BaseModel):
        city: str

    fake = backend(CALL)
    running = await serve(fake)
    tool = openai.pydantic_function_tool(Weather, name="weather")["function"]
    fields = {"input": "hi", "tools": [{"type": "function", **tool}], "tool_choice": "required"}
    async with running.openai.responses.stream(model=MODEL, **fields) as stream:
        answer = await stream.get_final_response()
    assert answer.output[0].parsed_arguments == {"city": "Páris"}
    assert allows(fake.requests[0], CALL)
    assert not allows(fake.requests[0], "Hello")


async def test_only_allowed_tools_are_called_and_the_answer_says_which(serve: Serve) -> None:
    fake = backend(CALL)
    running = await serve(fake)
    tools = [{"type": "function", "name": name, "parameters": {}} for name in ("weather", "time")]
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "weather"}]}
    fields = {"input": "hi", "tools": tools, "tool_choice": allowed}
    answer = await running.openai.responses.create(model=MODEL, **fields)
    assert answer.output[0].name == "weather"
    assert answer.tool_choice.model_dump() == allowed
    assert allows(fake.requests[0], "Hello")
    assert not allows(fake.requests[0], CALL.replace("weather", "time"))
    named = await running.openai.responses.create(
        model=MODEL, **{**fields, "tool_choice": {"type": "function", "name": "weather"}}
    )
    assert named.tool_choice.model_dump() == {"type": "function", "name": "weather"}


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_are_those_of_the_text(serve: Serve, stream) -> None:
    running = await serve(FakeBackend("aé!"))
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    if stream:
        told = await events(running, **fields)
        answer = told[-1].response
        deltas = [event.logprobs for event in told if event.type == "response.output_text.delta"]
        assert [entry.logprob for part in deltas for entry in part] == [
            entry.logprob for entry in answer.output[0].content[0].logprobs
        ]
    else:
        answer = await whole(running, **fields)
    entries = answer.output[0].content[0].logprobs
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == "aé!"
    assert entries[0].logprob == -ord("a") / 100
    assert [len(entry.top_logprobs) for entry in entries] == [2] * 4


async def test_every_option_reaches_the_backend(serve: Serve) -> None:
    fake = FakeBackend("abc")
    running = await serve(
        fake, api_keys=("k@gold",), tiers={"gold": Tier(name="gold", min_tokens_per_second=30.0)}
    )
    headers = {"Authorization": "Bearer k", "X-Min-Tokens-Per-Second": "12"}
    body = {**ASK, "temperature": 0.3, "top_k": 5, "seed": 11, "speculation": {"enabled": False}}
    answer = await running.client.post("/v1/responses", json=body, headers=headers)
    assert answer.json()["speculation"]["min_tokens_per_second"] == 12.0
    request = fake.requests[0]
    assert request.sampling == SamplingParams(temperature=0.3, top_k=5, seed=11)
    assert request.speculation == SpeculationOptions(enabled=False)
    assert (request.tier, request.min_tokens_per_second) == ("gold", 12.0)
    refused = await running.client.post("/v1/responses", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize("stream", [False, True])
async def test_errors_before_the_first_token_are_those_of_chat(serve: Serve, stream) -> None:
    fake = FakeBackend()
    fake.error = UnavailableError("nobody")
    running = await serve(fake)
    create = running.openai.responses.create
    with pytest.raises(openai.InternalServerError) as failed:
        await create(model=MODEL, input="hi", stream=stream)
    assert (failed.value.status_code, failed.value.code) == (503, "no_verifier")
    for fields, code in (
        ({"model": "gpt-9"}, "model_not_found"),
        ({"input": "x" * 300}, "context_length_exceeded"),
    ):
        with pytest.raises(openai.APIStatusError) as refused:
            await create(**{"model": MODEL, "input": "hi", "stream": stream, **fields})
        assert (refused.value.code, refused.value.param) == (code, next(iter(fields)))


async def test_an_error_in_the_middle_ends_the_stream_with_its_events(serve: Serve) -> None:
    fake = FakeBackend("abcdef")
    fake.error, fake.error_after_chunks = RuntimeError("secret path"), 1
    running = await serve(fake)
    told = await events(running)
    error, failed = told[-2:]
    assert (error.type, error.code) == ("error", "internal_error")
    assert "secret" not in error.message
    assert (failed.type, failed.response.status) == ("response.failed", "failed")
    assert (failed.response.error.code, failed.response.error.message) == ("server_error", error.message)
    assert (failed.response.output_text, failed.response.output[0].status) == ("abc", "incomplete")
    stream = await running.openai.responses.create(model=MODEL, input="hi", stream=True)
    with pytest.raises(openai.APIError, match="internal error, reference"):
        [event async for event in stream]


async def test_an_error_after_a_long_wait_is_an_event_before_any_other(serve: Serve, monkeypatch) -> None:
    monkeypatch.setattr(app, "KEEP_ALIVE_SECONDS", 0.01)
    fake = FakeBackend()
    fake.hold_after_chunks = 0
    running, clock = await serve(fake, limits=GatewayLimits(request_timeout_seconds=10)), LoopClock()
    (error,) = await events(running, once_begun=lambda: clock.advance(10))
    assert (error.type, error.code, error.sequence_number) == ("error", "deadline_exceeded", 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_its_request(serve: Serve, stream) -> None:
    fake = FakeBackend("abcdef")
    fake.hold_after_chunks = 1
    running = await serve(fake)
    asked = asyncio.create_task(running.client.post("/v1/responses", json={**ASK, "stream": stream}))
    await eventually(lambda: fake.running == 1)
    await end(asked)
    await eventually(lambda: fake.running == 0)
    assert fake.cancelled == 1
    await eventually(lambda: running.gateway.admission.running == 0)


async def test_a_conversation_that_the_template_refuses_is_told_by_its_name_here(serve: Serve) -> None:
    running = await serve(FakeBackend(), chat_template="{{ raise_exception('roles must alternate') }}")
    answer = await running.client.post("/v1/responses", json=ASK)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "input"
    assert answer.json()["error"]["message"].startswith("input must fit the model's chat template: roles")


THOUGHT = "Grüße?\n\nSo."
SAID = f"<think>\n{THOUGHT}\n</think>\n\n"


@pytest.mark.parametrize("chunk_tokens", [1, 7, 500])
@pytest.mark.parametrize("answer", [TEXT, CALL])
async def test_a_thought_is_an_item_before_the_answer(serve: Serve, answer, chunk_tokens) -> None:
    fake = backend(SAID + answer, chunk_tokens=chunk_tokens)
    running = await serve(fake, chat_template=QWEN3)
    response = await whole(running, tools=TOOLS)
    thought, other = response.output
    assert (thought.type, thought.status, thought.summary) == ("reasoning", "completed", [])
    assert [part.model_dump() for part in thought.content] == [{"type": "reasoning_text", "text": THOUGHT}]
    assert other.type == ("function_call" if answer == CALL else "message")
    assert response.output_text == ("" if answer == CALL else TEXT)
    tokens = response.usage.output_tokens_details.reasoning_tokens
    assert len(THOUGHT.encode()) < tokens < len(SAID.encode())
    told = await events(running, tools=TOOLS)
    assert without_ids(told[-1].response) == without_ids(response)
    assert told[-1].response.usage == response.usage
    pieces = [one.delta for one in told if one.type == "response.reasoning_text.delta"]
    assert "".join(pieces) == THOUGHT
    kinds = list(dict.fromkeys(one.type for one in told if one.type.startswith("response.reasoning")))
    assert kinds == ["response.reasoning_text.delta", "response.reasoning_text.done"]
    added = [one.item.type for one in told if one.type == "response.output_item.added"]
    assert added == ["reasoning", other.type]
    items = [item.model_dump() for item in response.output]
    output = {"type": "function_call_output", "call_id": getattr(other, "call_id", "c"), "output": "rain"}
    await whole(running, input=[{"role": "user", "content": "hi"}, *items, output], tools=TOOLS)
    assert f"assistant\n<think>\n{THOUGHT}\n</think>\n\n" in prompt_of(fake.requests[-1])


@pytest.mark.parametrize("include", [None, ["message.output_text.logprobs"]])
async def test_an_answer_cut_inside_its_thought_is_incomplete(serve: Serve, include) -> None:
    running = await serve(FakeBackend(SAID + TEXT), chat_template=QWEN3)
    response = await whole(running, max_output_tokens=12, include=include)
    assert (response.status, response.output_text) == ("incomplete", "")
    assert (response.output[0].type, response.output[0].status) == ("reasoning", "incomplete")
    assert len(response.output) == (1 if include is None else 2)  # log-probabilities need a message
