"""Tool calls and multiple answers, with OpenAI's official client and the embedded default."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from services.embedded.stack import EmbeddedStack

pytestmark = pytest.mark.xdist_group("e2e")

MODEL = "smollm2-135m-instruct"
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "days": {"$ref": "#/$defs/days"},
    },
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 7}},
}
CLOCK = {
    "type": "object",
    "properties": {"zone": {"enum": ["CET", "UTC"]}},
    "required": ["zone"],
    "additionalProperties": False,
}
SCHEMAS = {"get_weather": WEATHER, "get_time": CLOCK}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "The weather of a city.", "parameters": WEATHER},
    },
    {"type": "function", "function": {"name": "get_time", "description": "Now.", "parameters": CLOCK}},
]
ASK = [{"role": "user", "content": "What will the weather be like in Paris for three days, in celsius?"}]
FIELDS: dict[str, Any] = {"model": MODEL, "messages": ASK, "tools": TOOLS, "max_tokens": 400}


@pytest.fixture
def client(stack: EmbeddedStack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="unused", max_retries=0) as one:
        yield one


def check(name: str, arguments: str) -> dict[str, Any]:
    value = json.loads(arguments)
    jsonschema.validate(value, SCHEMAS[name])
    return value


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 3}, {"temperature": 1.0}]
)
def test_a_required_call_parses_and_keeps_to_its_schema(
    client: openai.OpenAI, sampling: dict[str, float]
) -> None:
    def calls(**extra: object) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        create = client.chat.completions.create
        answer = create(**FIELDS, tool_choice="required", **sampling, extra_body=extra)
        (choice,) = answer.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        told = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or []]
        return told, answer.model_extra["speculation"]

    told, speculation = calls()
    assert 1 <= len(told) <= 8
    for name, arguments in told:
        check(name, arguments)
    assert speculation["lookup_accepted_tokens"] > 0  # the forced parts of a call
    if "seed" in sampling or not sampling["temperature"]:
        assert calls(speculation={"enabled": False})[0] == told


def test_a_named_function_is_called_once_and_streamed_in_fragments(client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    fields = {**FIELDS, "tool_choice": named, "temperature": 0}
    whole = client.chat.completions.create(**fields).choices[0].message.tool_calls or []
    (call,) = whole
    assert call.function.name == "get_weather"
    check("get_weather", call.function.arguments)
    chunks = list(client.chat.completions.create(**fields, stream=True))
    deltas = [delta for chunk in chunks for c in chunk.choices for delta in c.delta.tool_calls or []]
    assert (deltas[0].function.name, deltas[0].function.arguments) == ("get_weather", "")
    assert deltas[0].id is not None
    assert len(deltas) > 2
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_result_of_a_call_is_answered(client: openai.OpenAI) -> None:
    call = {"name": "get_weather", "arguments": '{"city": "Paris", "unit": "celsius", "days": 3}'}
    messages: list[Any] = [
        *ASK,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny, 21 degrees"},
    ]
    create = client.chat.completions.create
    answer = create(model=MODEL, messages=messages, tools=TOOLS, max_tokens=60, temperature=0).choices[0]
    assert answer.message.content or answer.message.tool_calls
    without = create(model=MODEL, messages=messages, max_tokens=60, temperature=0).choices[0]
    assert "sunny" in (without.message.content or "")


def test_several_answers_are_those_of_their_seeds(client: openai.OpenAI) -> None:
    story: list[Any] = [{"role": "user", "content": "Tell me a story about a dragon." * 12}]

    def texts(**fields: Any) -> list[str]:
        create = client.chat.completions.create
        answer = create(model=MODEL, messages=story, temperature=1.0, max_tokens=20, **fields)
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= 20 * len(answer.choices)
        return [choice.message.content or "" for choice in answer.choices]

    three = texts(n=3, seed=7)
    assert len(set(three)) == 3
    assert texts(n=3, seed=7) == three
    assert texts(seed=7) == three[:1]
    assert texts(n=2, seed=7, extra_body={"speculation": {"enabled": False}}) == three[:2]
    assert len(set(texts(n=3))) > 1


def test_answers_at_temperature_0_are_equal(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="1, 2, 3,", temperature=0, max_tokens=6, n=4)
    assert len({choice.text for choice in answer.choices}) == 1
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


def called_before(city: str) -> list[dict[str, Any]]:
    """A turn with a tool call as an example: without one, the small model calls nothing."""
    arguments = json.dumps({"city": city, "unit": "celsius", "days": 2})
    call = {"id": city, "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    question = f"What will the weather be like in {city} for two days, in celsius?"
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": city, "content": "sunny, 20"},
        {"role": "assistant", "content": "Sunny, 20."},
    ]


def test_strict_calls_that_the_model_decides_on_keep_to_their_schemas(client: openai.OpenAI) -> None:
    """With the same seeds and no strict function, one of these answers begins a call and breaks it off."""
    strict = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    messages = [turn for city in ("Rome", "Oslo", "Lima") for turn in called_before(city)] + ASK
    fields = {**FIELDS, "tools": strict, "messages": messages, "max_tokens": 120}
    answer = client.chat.completions.create(**fields, n=8, temperature=1.0, seed=5)
    called = [choice for choice in answer.choices if choice.finish_reason == "tool_calls"]
    assert 0 < len(called) < 8  # the model decides
    for choice in called:
        for call in choice.message.tool_calls:
            check(call.function.name, call.function.arguments)
    assert not any("<tool_call>" in (c.message.content or "") for c in answer.choices)
