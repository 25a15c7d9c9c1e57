"""Tool calls through the whole gateway: prompts, grammars, answers whole and streamed, refusals."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from llguidance import LLMatcher, LLTokenizer

from dspark_core.output_rules import GrammarKind
from dspark_core.records import GenerateRequest
from dspark_core.tokenization.grammar_sources import grammar_source
from dspark_core.tokenization.tool_formats import ToolFormat
from tests.integration.gateway.conftest import MODEL, RunningGateway, Serve
from tests.support.byte_tokenizer import END, VOCAB, byte_backend
from tests.support.fake_generation import FakeBackend
from tests.support.tool_templates import QWEN_CODER

ASK = [{"role": "user", "content": "Weather in Paris?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"type": "string", "maxLength": 20}},
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells the weather.", "parameters": SCHEMA},
}
TIME = {"type": "function", "function": {"name": "time"}}
TOOLS = [WEATHER, TIME]
ARGUMENTS = '{"city": "Páris"}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
TIME_CALL = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
BARE = f'{{"name": "weather", "parameters": {ARGUMENTS}}}'

NATIVE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    '{% for c in m.tool_calls %}{"name": "{{ c.function.name }}", "parameters": '
    "{{ c.function.arguments | tojson }}}{% endfor %}<|im_end|>{% endfor %}<|im_start|>assistant\n"
)
"""A template that writes calls as Llama 3's does."""


def backend(answer: str, **fields: Any) -> FakeBackend:
    return FakeBackend(answer, max_context_tokens=8000, **fields)


def prompt_of(request: GenerateRequest) -> str:
    return bytes(token for token in request.prompt_token_ids if token < 256).decode()


async def streamed(running: RunningGateway, **fields: Any) -> tuple[dict[int, Any], str | None]:
    """Returns the messages by choice, assembled from the chunks, and the last finish reason."""
    stream = await running.openai.chat.completions.create(model=MODEL, messages=ASK, stream=True, **fields)
    messages: dict[int, Any] = {}
    reason = None
    async for chunk in stream:
        for choice in chunk.choices:
            message = messages.setdefault(choice.index, {"content": "", "calls": []})
            message["content"] += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                if call.id is not None:
                    assert (call.type, call.function.arguments) == ("function", "")
                    assert call.index == len(message["calls"])
                    message["calls"].append([call.id, call.function.name, ""])
                else:
                    assert (call.type, call.function.name) == (None, None)
                    message["calls"][call.index][2] += call.function.arguments
            reason = choice.finish_reason or reason
    return messages, reason


@pytest.mark.parametrize("chunk_tokens", [1, 7, 500])
async def test_calls_of_a_streamed_answer_come_in_fragments(serve: Serve, chunk_tokens) -> None:
    running = await serve(backend(f"I look.\n{CALL}\n{TIME_CALL}", chunk_tokens=chunk_tokens))
    messages, reason = await streamed(running, tools=TOOLS)
    (first, second) = messages[0]["calls"]
    assert messages[0]["content"] == "I look."
    assert (first[1:], second[1:]) == (["weather", ARGUMENTS], ["time", "{}"])
    assert first[0] != second[0]
    assert reason == "tool_calls"


async def test_calls_of_a_whole_answer(serve: Serve) -> None:
    running = await serve(backend(f"{CALL}\n{TIME_CALL}"))
    answer = await running.openai.chat.completions.create(model=MODEL, messages=ASK, tools=TOOLS)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    first, second = choice.message.tool_calls
    assert (first.type, first.function.name, first.function.arguments) == ("function", "weather", ARGUMENTS)
    assert second.function.name == "time"
    assert first.id.startswith("call_")
    assert first.id != second.id
    assert answer.usage.completion_tokens == len(f"{CALL}\n{TIME_CALL}".encode()) + 1


async def test_the_conversation_goes_on_with_what_was_called(serve: Serve) -> None:
    fake = backend(CALL)
    running = await serve(fake)
    create = running.openai.chat.completions.create
    calling = (await create(model=MODEL, messages=ASK, tools=TOOLS)).choices[0].message
    result = {"role": "tool", "tool_call_id": calling.tool_calls[0].id, "content": "rain"}
    await create(model=MODEL, messages=[*ASK, calling.model_dump(), result], tools=TOOLS)
    first, second = (prompt_of(request) for request in fake.requests)
    assert first.startswith("system\nYou may call functions")
    assert '{"name": "weather", "description": "Tells the weather.", "parameters": ' in first
    # The first turn's prompt is a prefix of the second's, so the prefix cache has it.
    assert second == f"{first}{CALL}user\n<tool_response>\nrain\n</tool_response>assistant\n"


@pytest.mark.parametrize("arguments", ["", "no json", '{"a": "\\ud800"}', "[1]"])
async def test_calls_that_a_model_failed_at_may_come_back(serve: Serve, arguments: str) -> None:
    fake = backend("sorry")
    running = await serve(fake)
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": "c", "content": "what?"}
    messages = [*ASK, {"role": "assistant", "tool_calls": [call]}, result]
    answer = await running.openai.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS)
    assert answer.choices[0].message.content == "sorry"
    assert f'"arguments": {arguments or "{}"}}}\n</tool_call>' in prompt_of(fake.requests[0])


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_without_calls_is_content(serve: Serve, stream) -> None:
    text = 'No <tool> needed, <tool_call> {"name": "sing"} is none.\n'
    running = await serve(backend(text, chunk_tokens=2))
    if stream:
        messages, reason = await streamed(running, tools=TOOLS)
        assert messages == {0: {"content": text, "calls": []}}
    else:
        answer = await running.openai.chat.completions.create(model=MODEL, messages=ASK, tools=TOOLS)
        reason = answer.choices[0].finish_reason
        assert answer.choices[0].message.content == text
        assert answer.choices[0].message.tool_calls is None
    assert reason == "stop"


async def test_a_call_that_is_cut_off_is_content_of_a_whole_answer(serve: Serve) -> None:
    running = await serve(backend(f"I look. {CALL}"))
    create = running.openai.chat.completions.create
    answer = await create(model=MODEL, messages=ASK, tools=TOOLS, max_tokens=60)
    assert answer.choices[0].message.content == f"I look. {CALL}"[:60]
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "length"
    messages, reason = await streamed(running, tools=TOOLS, max_tokens=70)
    ((_, name, arguments),) = messages[0]["calls"]
    assert name == "weather"
    assert ARGUMENTS.startswith(arguments)
    assert 0 < len(arguments) < len(ARGUMENTS)
    assert reason == "length"


async def test_stop_logprobs_and_several_answers_go_together_with_tools(serve: Serve) -> None:
    running = await serve(backend(f"a {CALL} STOP b"))
    fields = {"tools": TOOLS, "n": 2, "stop": "STOP", "logprobs": True}
    answer = await running.openai.chat.completions.create(model=MODEL, messages=ASK, **fields)
    for choice in answer.choices:
        assert choice.message.content == "a"
        assert choice.message.tool_calls[0].function.arguments == ARGUMENTS
        assert choice.finish_reason == "tool_calls"
        told = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode()
        assert told == f"a {CALL} "
    ids = [choice.message.tool_calls[0].id for choice in answer.choices]
    assert ids[0] != ids[1]
    messages, _ = await streamed(running, **fields)
    for message in messages.values():
        assert (message["content"], message["calls"][0][2]) == ("a", ARGUMENTS)


@pytest.mark.parametrize("stream", [False, True])
async def test_one_call_ends_the_answer_where_no_more_are_wanted(serve: Serve, stream) -> None:
    fake = backend(f"{CALL}\n{TIME_CALL}", chunk_tokens=1)
    running = await serve(fake)
    fields = {"tools": TOOLS, "parallel_tool_calls": False}
    if stream:
        messages, reason = await streamed(running, **fields)
        assert [call[1:] for call in messages[0]["calls"]] == [["weather", ARGUMENTS]]
    else:
        answer = await running.openai.chat.completions.create(model=MODEL, messages=ASK, **fields)
        reason = answer.choices[0].finish_reason
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.arguments == ARGUMENTS
    assert reason == "tool_calls"
    assert (fake.cancelled, fake.running) == (1, 0)


async def test_without_tools_marks_are_text(serve: Serve) -> None:
    fake = backend(CALL)
    running = await serve(fake)
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        answer = await running.openai.chat.completions.create(model=MODEL, messages=ASK, **fields)
        assert answer.choices[0].message.content == CALL
        assert prompt_of(fake.requests[-1]) == "user\nWeather in Paris?assistant\n"


async def test_a_template_that_knows_tools_is_given_them(serve: Serve) -> None:
    fake = backend(BARE)
    running = await serve(fake, chat_template=NATIVE)
    answer = await running.openai.chat.completions.create(model=MODEL, messages=ASK, tools=[WEATHER])
    message = answer.choices[0].message
    assert message.tool_calls[0].function.arguments == ARGUMENTS
    assert prompt_of(fake.requests[0]).startswith(f"system\n[{json.dumps(WEATHER)}]user\n")
    await running.openai.chat.completions.create(model=MODEL, messages=[*ASK, message.model_dump(), *ASK])
    assert f"assistant\n{BARE}user\n" in prompt_of(fake.requests[1])


async def test_the_format_may_be_set(serve: Serve) -> None:
    running = await serve(backend(BARE), tool_format=ToolFormat.LLAMA3_JSON)
    messages, reason = await streamed(running, tools=TOOLS)
    assert [call[1:] for call in messages[0]["calls"]] == [["weather", ARGUMENTS]]
    assert reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
async def test_calls_in_tags_are_typed_by_the_schema(serve: Serve, stream) -> None:
    """Qwen3-Coder's template: found, read in fragments and whole, demanded, and written back."""
    city = {"type": "string", "description": "Its name."}
    properties = {"city": city, "days": {"type": "integer"}, "zip": {"type": "string"}}
    function = {"name": "weather", "parameters": {"type": "object", "properties": properties}}
    inner = "".join(
        f"<parameter={key}>\n{value}\n</parameter>\n"
        for key, value in {"city": '"Páris"', "days": "3", "zip": "75001"}.items()
    )
    call = f"<tool_call>\n<function=weather>\n{inner}</function>\n</tool_call>"
    fake = backend(f"I look.\n\n{call}")
    running = await serve(fake, chat_template=QWEN_CODER)
    fields = {"tools": [{"type": "function", "function": function}]}
    if stream:
        messages, reason = await streamed(running, **fields)
        content, ((_, name, arguments),) = messages[0]["content"], messages[0]["calls"]
    else:
        answer = await running.openai.chat.completions.create(model=MODEL, messages=ASK, **fields)
        message, reason = answer.choices[0].message, answer.choices[0].finish_reason
        content, name, arguments = message.content, *_function(message)
        again = [*ASK, message.model_dump()]
        await running.openai.chat.completions.create(
            model=MODEL, messages=again, tool_choice="required", **fields
        )
        assert f"I look.\n{call}" in prompt_of(fake.requests[1])
        assert allows(fake.requests[1], call)
        assert not allows(fake.requests[1], call.replace("3", "soon"))
    assert (content, name, reason) == ("I look.", "weather", "tool_calls")
    assert json.loads(arguments) == {"city": '"Páris"', "days": 3, "zip": "75001"}


def _function(message: Any) -> tuple[str, str]:
    (call,) = message.tool_calls
    return call.function.name, call.function.arguments


def allows(request: GenerateRequest, text: str) -> bool:
    """Whether the text is a complete answer under the request's grammar."""
    tokenizer = LLTokenizer(byte_backend().to_str(), n_vocab=VOCAB, eos_token=[END])
    matcher = LLMatcher(tokenizer, grammar_source(request.grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    token_ids = [*text.encode()]
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


async def grammar_of(serve: Serve, answer: str, **fields: Any) -> GenerateRequest:
    fake = backend(answer)
    running = await serve(fake, tool_format=fields.pop("tool_format", None))
    given = await running.openai.chat.completions.create(
        model=MODEL, messages=ASK, **{"tools": TOOLS, **fields}
    )
    if answer in (CALL, BARE):
        assert given.choices[0].message.tool_calls[0].function.arguments == ARGUMENTS
        assert given.choices[0].finish_reason == "tool_calls"
    return fake.requests[0]


async def test_a_required_call_is_one_or_several_by_their_schemas(serve: Serve) -> None:
    request = await grammar_of(serve, CALL, tool_choice="required")
    assert request.grammar.kind is GrammarKind.LARK
    assert allows(request, CALL)
    assert allows(request, f"{CALL}\n{TIME_CALL}")
    assert allows(request, "\n".join([TIME_CALL] * 8))
    for text in (
        "Hello",
        "",
        f"Well. {CALL}",
        "\n".join([TIME_CALL] * 9),
        CALL.replace("weather", "sing"),
        CALL.replace("city", "town"),
        CALL.replace('"Páris"', ' "Páris"'),  # spacing must be as models are shown it
        CALL.replace('"Páris"', "3"),
        TIME_CALL.replace("{}", '{"a": 1}'),
    ):
        assert not allows(request, text), text


async def test_one_function_is_called_once(serve: Serve) -> None:
    request = await grammar_of(serve, CALL, tool_choice={"type": "function", "function": {"name": "weather"}})
    assert allows(request, CALL)
    assert not allows(request, TIME_CALL)
    assert not allows(request, f"{CALL}\n{CALL}")
    single = await grammar_of(serve, CALL, tool_choice="required", parallel_tool_calls=False)
    assert allows(single, TIME_CALL)
    assert not allows(single, f"{CALL}\n{TIME_CALL}")


async def test_calls_without_marks_are_required_as_such(serve: Serve) -> None:
    request = await grammar_of(serve, BARE, tool_choice="required", tool_format=ToolFormat.LLAMA3_JSON)
    assert allows(request, BARE)
    assert allows(request, '{"name": "time", "parameters": {}}')
    assert not allows(request, CALL)
    assert not allows(request, f"{BARE}{BARE}")


@pytest.mark.parametrize("tool_format", [None, ToolFormat.LLAMA3_JSON])
async def test_an_answer_is_a_call_or_keeps_to_its_format(serve: Serve, tool_format) -> None:
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "additionalProperties": False}
    shape = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    answer = CALL if tool_format is None else BARE
    request = await grammar_of(serve, answer, response_format=shape, tool_format=tool_format)
    assert allows(request, answer)
    assert allows(request, '{"sum": 3}')
    assert not allows(request, '{"sums": 3}')
    assert not allows(request, "3")


async def test_what_may_be_called_is_not_constrained(serve: Serve) -> None:
    assert (await grammar_of(serve, CALL)).grammar is None


STRICT = [{"type": "function", "function": {**WEATHER["function"], "strict": True}}, TIME]
WRONG_CALL = CALL.replace("city", "town")


async def test_calls_of_strict_functions_keep_to_their_schemas_in_any_text(serve: Serve) -> None:
    request = await grammar_of(serve, CALL, tools=STRICT)
    for text in (
        "",
        "It is sunny.\n",
        "a < b, {} and </tool_call>",
        CALL,
        f"I look.\n{CALL}",
        f"{CALL}\n{TIME_CALL}\nDone.",
        '<tool_call>\n{"name": "time", "arguments": {"zone": [1, "x"]}}\n</tool_call>',  # not strict
    ):
        assert allows(request, text), text
    for text in (
        WRONG_CALL,
        f"{CALL}\n{WRONG_CALL}",
        "I look. <tool_call> now",
        '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>',
        CALL.removesuffix("</tool_call>"),
    ):
        assert not allows(request, text), text


async def test_one_strict_call_at_most_ends_the_answer(serve: Serve) -> None:
    request = await grammar_of(serve, CALL, tools=STRICT, parallel_tool_calls=False)
    assert allows(request, f"I look.\n{CALL}")
    assert allows(request, "Sunny.")
    assert not allows(request, f"{CALL}\n{CALL}")
    assert not allows(request, f"{CALL} Done.")


async def test_strict_calls_without_marks_are_the_whole_answer(serve: Serve) -> None:
    request = await grammar_of(serve, BARE, tools=STRICT, tool_format=ToolFormat.LLAMA3_JSON)
    assert allows(request, BARE)
    assert allows(request, "Sunny, {} or not.")
    assert allows(request, "")
    assert not allows(request, BARE.replace("city", "town"))
    assert not allows(request, f"{BARE} Done.")
    assert not allows(request, "{ }")


def only(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.mark.parametrize("tool_format", [None, ToolFormat.LLAMA3_JSON])
async def test_tools_that_are_not_allowed_are_told_of_and_not_called(serve: Serve, tool_format) -> None:
    call = CALL if tool_format is None else BARE
    time_call = TIME_CALL if tool_format is None else '{"name": "time", "parameters": {}}'
    request = await grammar_of(serve, call, tool_choice=only("auto", "weather"), tool_format=tool_format)
    assert '"name": "time"' in prompt_of(request)
    assert allows(request, "Sunny.")
    assert allows(request, call)
    assert allows(request, call.replace("city", "town"))  # the tool is not strict
    assert not allows(request, time_call)
    required = await grammar_of(serve, call, tool_choice=only("required", "weather"), tool_format=tool_format)
    assert allows(required, call)
    for text in ("Sunny.", time_call, call.replace("city", "town")):
        assert not allows(required, text), text
    every = await grammar_of(
        serve, call, tool_choice=only("auto", "weather", "time"), tool_format=tool_format
    )
    assert every.grammar is None


async def test_allowed_calls_may_keep_to_a_format_or_end_with_one(serve: Serve) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "boolean"}}}
    choice = only("auto", "weather")
    request = await grammar_of(
        serve, CALL, tool_choice=choice, response_format=shape, parallel_tool_calls=False
    )
    assert allows(request, "true")
    assert allows(request, CALL)
    assert not allows(request, TIME_CALL)
    assert not allows(request, f"{CALL}\n{CALL}")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"tool_choice": only("auto", "weather")}, "tool_choice", "needs tools"),
        ({"tools": TOOLS, "tool_choice": only("auto")}, "tool_choice", "at least one tool"),
        ({"tools": TOOLS, "tool_choice": only("auto", "sing")}, "tool_choice", "'sing', which is none"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "needs a mode and tools"),
        (
            {"tools": TOOLS, "tool_choice": {**only("auto", "time"), "type": "auto"}},
            "tool_choice",
            "cannot have a mode and tools",
        ),
        (
            {"tools": TOOLS, "tool_choice": only("never", "time")},
            "tool_choice.allowed_tools.mode",
            "'auto' or 'required'",
        ),
        (
            {
                "tools": [
                    TIME,
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"patternProperties": {"(?=a)": {}}}},
                    },
                ],
                "tool_choice": "required",
            },
            "tools[1].function.parameters",
            "regex parse error",
        ),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
            "none of the tools",
        ),
        ({"tools": [{"type": "function", "function": {"name": "é"}}]}, "tools[0].function.name", "letters"),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": f"f{n}",
                            "parameters": {"properties": {"a": {"const": "x" * 30_000}}},
                        },
                    }
                    for n in range(3)
                ],
                "tool_choice": "required",
            },
            "tools",
            "<= 65536 characters",
        ),
    ],
)
async def test_what_is_wrong_is_refused_by_name(serve: Serve, fields, param, message) -> None:
    fake = backend(CALL)
    running = await serve(fake)
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        await running.openai.chat.completions.create(model=MODEL, messages=ASK, **fields)
    assert refused.value.param == param
    assert fake.requests == []


async def test_a_schema_that_cannot_be_demanded_may_still_be_told_of(serve: Serve) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"patternProperties": {"(?=a)": {}}}}}
    running = await serve(backend("no"))
    answer = await running.openai.chat.completions.create(model=MODEL, messages=ASK, tools=[tool])
    assert answer.choices[0].message.content == "no"
