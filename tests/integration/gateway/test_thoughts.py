"""Thoughts of a thinking model through the whole gateway: apart from the answer, whole and streamed."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import openai
import pytest

from services.cli.serving.client import ChatPiece, GatewayClient
from tests.integration.gateway.conftest import MODEL, RunningGateway, Serve
from tests.integration.gateway.test_tools import ARGUMENTS, ASK, CALL, TOOLS, allows, backend, prompt_of
from tests.support.thinking_templates import ALWAYS, QWEN3

THOUGHT = "Grüße: <tool_call>?\n\nSo."
SAID = f"<think>\n{THOUGHT}\n</think>\n\n"
ANSWER = "Yes, 世界."


async def whole(running: RunningGateway, **fields: Any) -> Any:
    return await running.openai.chat.completions.create(**{"model": MODEL, "messages": ASK, **fields})


async def streamed(running: RunningGateway, **fields: Any) -> tuple[str, str, Any]:
    """The thought, the content, and the last chunk, which has the usage."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    thought, content, last = "", "", None
    async for chunk in await whole(running, **options, **fields):
        for choice in chunk.choices:
            piece = getattr(choice.delta, "reasoning_content", None)
            assert piece == getattr(choice.delta, "reasoning", None)
            assert not (piece and choice.delta.content)
            assert not (piece and content), "a thought after its answer"
            thought += piece or ""
            content += choice.delta.content or ""
        last = chunk
    return thought, content, last


@pytest.mark.parametrize("chunk_tokens", [1, 2, 7, 500])
@pytest.mark.parametrize(("template", "begin"), [(QWEN3, SAID), (ALWAYS, SAID.removeprefix("<think>\n"))])
async def test_a_thought_is_apart_from_its_answer(serve: Serve, template, begin, chunk_tokens) -> None:
    fake = backend(begin + ANSWER, chunk_tokens=chunk_tokens)
    running = await serve(fake, chat_template=template)
    answer = await whole(running)
    message = answer.choices[0].message
    assert (message.reasoning_content, message.reasoning, message.content) == (THOUGHT, THOUGHT, ANSWER)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len((begin + ANSWER).encode()) + 1
    thought_tokens = answer.usage.completion_tokens_details.reasoning_tokens
    # Marks of single letters count from where they are whole.
    assert 0 <= len(begin.strip().encode()) - thought_tokens < len("<think>")
    assert (await streamed(running))[:2] == (THOUGHT, ANSWER)
    assert (await streamed(running))[2].usage == answer.usage


async def test_a_model_that_is_told_not_to_think_is_not_read_for_thoughts(serve: Serve) -> None:
    running = await serve(backend(SAID + ANSWER), chat_template=QWEN3)
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    message = (await whole(running, extra_body=off)).choices[0].message
    assert (message.reasoning_content, message.content) == (None, SAID + ANSWER)


async def test_a_gateway_told_not_to_look_for_thoughts_returns_them_as_text(serve: Serve) -> None:
    running = await serve(backend(SAID + ANSWER), chat_template=QWEN3, reasoning=False)
    answer = await whole(running)
    assert answer.choices[0].message.content == SAID + ANSWER
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0


async def test_plain_completions_stay_as_the_model_wrote_them(serve: Serve) -> None:
    running = await serve(backend(SAID + ANSWER), chat_template=ALWAYS)
    answer = await running.openai.completions.create(model=MODEL, prompt="<think>", max_tokens=500)
    assert answer.choices[0].text == SAID + ANSWER


@pytest.mark.parametrize("chunk_tokens", [1, 500])
async def test_stop_texts_do_not_end_a_thought(serve: Serve, chunk_tokens) -> None:
    running = await serve(backend(SAID + ANSWER, chunk_tokens=chunk_tokens), chat_template=QWEN3)
    thought, content, _ = await streamed(running, stop=["So.", "</think>", ",", "\n\n"])
    assert (thought, content) == (THOUGHT, "Yes")


async def test_an_answer_cut_inside_its_thought_has_no_content(serve: Serve) -> None:
    running = await serve(backend(SAID + ANSWER), chat_template=QWEN3)
    answer = await whole(running, max_tokens=16)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("", "length")
    assert choice.message.reasoning_content == "Grüße:"
    assert (await streamed(running, max_tokens=16))[:2] == ("Grüße:", "")


@pytest.mark.parametrize("chunk_tokens", [1, 500])
async def test_calls_are_looked_for_behind_the_thought_only(serve: Serve, chunk_tokens) -> None:
    said = f"<think>\n{CALL}\n</think>\n\n{CALL}"
    running = await serve(backend(said, chunk_tokens=chunk_tokens), chat_template=QWEN3)
    (choice,) = (await whole(running, tools=TOOLS)).choices
    assert (choice.message.reasoning_content, choice.message.content) == (CALL, None)
    (call,) = choice.message.tool_calls
    assert (call.function.arguments, choice.finish_reason) == (ARGUMENTS, "tool_calls")


@pytest.mark.parametrize("chunk_tokens", [1, 500])
async def test_log_probabilities_cover_all_tokens(serve: Serve, chunk_tokens) -> None:
    running = await serve(backend(SAID + ANSWER, chunk_tokens=chunk_tokens), chat_template=QWEN3)
    (choice,) = (await whole(running, logprobs=True)).choices
    assert bytes(byte for one in choice.logprobs.content for byte in one.bytes).decode() == SAID + ANSWER
    tokens = bytearray()
    async for chunk in await whole(running, logprobs=True, stream=True):
        for one in chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else ():
            tokens += bytes(one.bytes)
    assert tokens.decode() == SAID + ANSWER


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
async def test_thoughts_of_earlier_answers_are_for_the_template(serve: Serve, name: str) -> None:
    fake = backend(SAID + CALL)
    running = await serve(fake, chat_template=QWEN3)
    message = (await whole(running, tools=TOOLS)).choices[0].message.model_dump()
    message = {key: value for key, value in message.items() if not key.startswith("reasoning") or key == name}
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "rain"}
    await whole(running, messages=[*ASK, message, result], tools=TOOLS)
    assert f"assistant\n<think>\n{THOUGHT}\n</think>\n\n<tool_call>" in prompt_of(fake.requests[-1])
    await whole(running, messages=[*ASK, message, result, *ASK])
    assert THOUGHT not in prompt_of(fake.requests[-1])
    with pytest.raises(openai.BadRequestError, match=f"{name} belongs to messages of the assistant"):
        await whole(running, messages=[{**ASK[0], name: "Hm."}])


JSON = {
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": {"a": 1}}}}
}


@pytest.mark.parametrize(
    ("fields", "fine"),
    [
        (JSON, '{"a": 1}'),
        ({"extra_body": {"structured_outputs": {"regex": "a+"}}}, "aa"),
        ({"extra_body": {"structured_outputs": {"choice": ["yes", "no"]}}}, "no"),
        ({"tools": TOOLS, "tool_choice": "required"}, CALL),
    ],
)
async def test_grammars_apply_behind_the_thought(serve: Serve, fields, fine) -> None:
    fake = backend(SAID + fine)
    running = await serve(fake, chat_template=QWEN3)
    message = (await whole(running, **fields)).choices[0].message
    assert (message.reasoning_content, message.content) == (THOUGHT, None if fine == CALL else fine)
    optional = fake.requests[-1]
    assert allows(optional, SAID + fine)
    assert allows(optional, fine)
    assert not allows(optional, SAID)
    assert not allows(optional, f"{SAID}So: {fine}")
    always = await serve(fake, chat_template=ALWAYS)
    await whole(always, **fields)
    assert allows(fake.requests[-1], SAID.removeprefix("<think>") + fine)
    assert not allows(fake.requests[-1], fine)


@pytest.mark.parametrize(
    ("reasoning", "arguments"), [(True, {"enable_thinking": False}), (False, {"enable_thinking": True})]
)
async def test_without_a_thought_grammars_apply_from_the_start(serve: Serve, reasoning, arguments) -> None:
    fake = backend('{"a": 1}')
    running = await serve(fake, chat_template=QWEN3, reasoning=reasoning)
    await whole(running, extra_body={"chat_template_kwargs": arguments}, **JSON)
    assert allows(fake.requests[-1], '{"a": 1}')
    assert not allows(fake.requests[-1], SAID + '{"a": 1}')


async def test_a_grammar_too_large_behind_a_thought_is_refused_by_the_clients_name(serve: Serve) -> None:
    running = await serve(backend("a"), chat_template=QWEN3)
    largest = {"structured_outputs": {"regex": f"a{'|b' * 32767}"}}
    with pytest.raises(openai.BadRequestError, match=r"structured_outputs must be .*<= 65536 characters"):
        await whole(running, extra_body=largest)


async def test_terminal_commands_read_thoughts_apart(serve: Serve) -> None:
    running = await serve(backend(SAID + ANSWER), chat_template=QWEN3)

    def ask() -> list[ChatPiece]:
        with contextlib.closing(GatewayClient(running.url)) as client:
            return list(client.chat(ASK))

    pieces = await asyncio.to_thread(ask)
    assert "".join(piece.reasoning for piece in pieces) == THOUGHT
    assert "".join(piece.text for piece in pieces) == ANSWER
