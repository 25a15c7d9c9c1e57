"""Calls in the formats of Mistral's and Gemma's templates, through the whole gateway."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.integration.gateway.conftest import MODEL, Serve
from tests.integration.gateway.test_tools import (
    ARGUMENTS,
    ASK,
    STRICT,
    TIME,
    TOOLS,
    allows,
    backend,
    prompt_of,
    streamed,
)
from tests.support.tool_templates import GEMMA, GEMMA_FIRST, MISTRAL, MISTRAL_IDS, MISTRAL_LIST

LISTED = f'{{"name": "weather", "arguments": {ARGUMENTS}}}'
TIME_LISTED = '{"name": "time", "arguments": {}}'
NAMED, TIME_NAMED = f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}", "[TOOL_CALLS]time[ARGS]{}"
WITH_ID, TIME_WITH_ID = (call.replace("[ARGS]", "[CALL_ID]a1b2c3d4e[ARGS]") for call in (NAMED, TIME_NAMED))
BARE_KEYS = '<|tool_call>call:weather{city:<|"|>Páris<|"|>}<tool_call|>'
TIME_BARE = "<|tool_call>call:time{}<tool_call|>"
ONE = {
    MISTRAL_LIST: f"[TOOL_CALLS] [{LISTED}]",
    MISTRAL_IDS: WITH_ID,
    MISTRAL: NAMED,
    GEMMA: BARE_KEYS,
    GEMMA_FIRST: BARE_KEYS,
}
TWO = {
    MISTRAL_LIST: f"[TOOL_CALLS] [{LISTED}, {TIME_LISTED}]",
    MISTRAL_IDS: WITH_ID + TIME_WITH_ID,
    MISTRAL: NAMED + TIME_NAMED,
    GEMMA: BARE_KEYS + TIME_BARE,
    GEMMA_FIRST: BARE_KEYS + TIME_BARE,
}
every_template = pytest.mark.parametrize(
    "template", list(TWO), ids=["list", "ids", "named", "gemma", "first"]
)


@every_template
@pytest.mark.parametrize("chunk_tokens", [1, 9, 500])
async def test_calls_of_a_streamed_answer_come_in_fragments(serve: Serve, template, chunk_tokens) -> None:
    fake = backend(f"I look. {TWO[template]}", chunk_tokens=chunk_tokens)
    running = await serve(fake, chat_template=template)
    messages, reason = await streamed(running, tools=TOOLS)
    assert messages[0]["content"] == "I look."
    assert [call[1:] for call in messages[0]["calls"]] == [["weather", ARGUMENTS], ["time", "{}"]]
    assert reason == "tool_calls"
    assert "You may call functions" not in prompt_of(fake.requests[0])  # the template describes them


@every_template
async def test_the_conversation_goes_on_with_what_was_called(serve: Serve, template) -> None:
    fake = backend(TWO[template])
    running = await serve(fake, chat_template=template)
    create = running.openai.chat.completions.create
    message = (await create(model=MODEL, messages=ASK, tools=TOOLS)).choices[0].message
    assert [call.function.arguments for call in message.tool_calls] == [ARGUMENTS, "{}"]
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": f'"{call.function.name} is"'}
        for call in message.tool_calls
    ]
    await create(model=MODEL, messages=[*ASK, message.model_dump(), *results], tools=TOOLS)
    prompt = prompt_of(fake.requests[1])
    for told in ("Páris", '"weather is"', '"time is"'):
        assert told in prompt
    assert prompt.index("Páris") < prompt.index('"weather is"') < prompt.index('"time is"')


@every_template
async def test_required_and_named_calls_are_grammars(serve: Serve, template) -> None:
    fake = backend(ONE[template])
    running = await serve(fake, chat_template=template)

    async def demanded(**fields: Any) -> Any:
        answer = await running.openai.chat.completions.create(
            model=MODEL, messages=ASK, tools=TOOLS, **fields
        )
        assert answer.choices[0].message.tool_calls[0].function.arguments == ARGUMENTS
        assert answer.choices[0].finish_reason == "tool_calls"
        return fake.requests[-1]

    one, two = ONE[template], TWO[template]
    time = two.replace(one, "") if one in two else f"[TOOL_CALLS] [{TIME_LISTED}]"
    required = await demanded(tool_choice="required")
    for text in (one, two, time):
        assert allows(required, text), text
    for text in ("", "Hello", f"So: {one}", one.replace("weather", "sing"), one.replace("city", "town")):
        assert not allows(required, text), text
    single = await demanded(tool_choice="required", parallel_tool_calls=False)
    assert allows(single, one)
    assert not allows(single, two)
    named = await demanded(tool_choice={"type": "function", "function": {"name": "weather"}})
    assert allows(named, one)
    assert not allows(named, time)
    shape = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "boolean"}}}
    either = await demanded(response_format=shape)
    assert allows(either, "true")
    assert allows(either, two)


@every_template
async def test_strict_calls_keep_to_their_schemas_in_any_text(serve: Serve, template) -> None:
    fake = backend(ONE[template])
    running = await serve(fake, chat_template=template)
    await running.openai.chat.completions.create(model=MODEL, messages=ASK, tools=STRICT)
    one, two = ONE[template], TWO[template]
    for text in ("", "It is {sunny}, [see].", one, f"I look.\n{two}", f"{one} Done."):
        assert allows(fake.requests[0], text), text
    for text in (one.replace("city", "town"), f"{two} {one.replace('weather', 'other')}"):
        assert not allows(fake.requests[0], text), text


@pytest.mark.parametrize("strict", [False, True])
async def test_a_schema_that_gemmas_calls_cannot_keep_to_is_refused_where_it_matters(
    serve: Serve, strict
) -> None:
    fake = backend("Sunny.")
    running = await serve(fake, chat_template=GEMMA)
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": strict}}
    fields = {"model": MODEL, "messages": ASK, "tools": [TIME, tool]}
    if not strict:
        await running.openai.chat.completions.create(**fields)  # no grammar is needed
        fields["tool_choice"] = "required"
    with pytest.raises(
        openai.BadRequestError, match=r"'uniqueItems' beside .* cannot be demanded"
    ) as refused:
        await running.openai.chat.completions.create(**fields)
    assert refused.value.param == "tools[1].function.parameters"


async def test_gemmas_calls_are_read_as_json_of_their_types(serve: Serve) -> None:
    call = '<|tool_call>call:time{zones:[<|"|>CET<|"|>],utc:true,offset:-1.5,more:{a:null}}<tool_call|>'
    running = await serve(backend(call), chat_template=GEMMA)
    answer = await running.openai.chat.completions.create(model=MODEL, messages=ASK, tools=TOOLS)
    (told,) = answer.choices[0].message.tool_calls
    assert json.loads(told.function.arguments) == {
        "zones": ["CET"],
        "utc": True,
        "offset": -1.5,
        "more": {"a": None},
    }
