"""The official client against a gateway: what comes back, whole and streamed."""

import asyncio

import openai
import pytest

from dspark_core.records import SamplingParams, SpeculationOptions, Verification
from tests.integration.gateway.conftest import MODEL, Serve
from tests.support.byte_tokenizer import END, START, TEMPLATE
from tests.support.fake_generation import FakeBackend

HELLO = [{"role": "user", "content": "hi"}]
TEXT = "Grüße, 世界! 🙂 done"


async def test_a_chat_answer_is_complete(serve: Serve) -> None:
    backend = FakeBackend(TEXT)
    running = await serve(backend)
    answer = await running.openai.chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.system_fingerprint.startswith("fp_")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    prompt = (START, *b"user\nhi", END, START, *b"assistant\n")
    assert backend.requests[0].prompt_token_ids == prompt
    tokens = len(TEXT.encode()) + 1
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens == tokens
    assert answer.usage.total_tokens == len(prompt) + tokens
    stats = answer.model_extra["speculation"]
    rounds = -(-tokens // 3)
    assert (stats["rounds"], stats["drafted_tokens"], stats["verified_tokens"]) == (
        rounds,
        4 * rounds,
        3 * rounds,
    )
    assert stats["accepted_tokens"] == 2 * rounds
    assert (stats["accepted_length"], stats["acceptance_rate"]) == (3.0, 0.6667)
    assert stats["tokens_per_second"] > 0
    assert {"draft_seconds", "verify_seconds"} < stats.keys()


@pytest.mark.parametrize("chunk_tokens", [1, 2, 5, 100])
async def test_a_streamed_chat_is_the_same_answer_in_whole_characters(serve: Serve, chunk_tokens) -> None:
    running = await serve(FakeBackend(TEXT, chunk_tokens=chunk_tokens))
    stream = await running.openai.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    *parts, last = chunks
    assert parts[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in parts]
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert [chunk.choices[0].finish_reason for chunk in parts[-2:]] == [None, "stop"]
    assert parts[-1].model_extra["speculation"]["rounds"] > 0
    assert all(chunk.usage is None for chunk in parts)
    assert last.choices == []
    assert last.usage.completion_tokens == len(TEXT.encode()) + 1
    assert len({chunk.id for chunk in chunks}) == 1


async def test_usage_is_streamed_only_when_asked_for(serve: Serve) -> None:
    running = await serve(FakeBackend("ab"))
    stream = await running.openai.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    chunks = [chunk async for chunk in stream]
    assert all(chunk.choices for chunk in chunks)
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


async def test_completions_take_text_and_token_ids(serve: Serve) -> None:
    backend = FakeBackend("abc")
    running = await serve(backend)
    answer = await running.openai.completions.create(model=MODEL, prompt="once")
    assert (answer.object, answer.choices[0].text) == ("text_completion", "abc")
    assert answer.id.startswith("cmpl-")
    assert answer.choices[0].finish_reason == "stop"
    await running.openai.completions.create(model=MODEL, prompt=[1, 2, 3])
    assert [request.prompt_token_ids for request in backend.requests] == [tuple(b"once"), (1, 2, 3)]


async def test_streamed_completions_join_to_the_whole_text(serve: Serve) -> None:
    running = await serve(FakeBackend(TEXT, chunk_tokens=2))
    stream = await running.openai.completions.create(
        model=MODEL, prompt="p", max_tokens=100, stream=True, stream_options={"include_usage": True}
    )
    *parts, last = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in parts) == TEXT
    assert parts[-1].choices[0].finish_reason == "stop"
    assert parts[-1].model_extra["speculation"]["rounds"] > 0
    assert last.usage.completion_tokens == len(TEXT.encode()) + 1


async def test_every_option_reaches_the_backend(serve: Serve) -> None:
    backend = FakeBackend("abc")
    running = await serve(backend)
    await running.openai.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_completion_tokens=7,
        temperature=0.3,
        top_p=0.9,
        seed=11,
        extra_body={
            "top_k": 5,
            "min_p": 0.05,
            "speculation": {"enabled": False, "verification": "coupled", "max_draft_tokens": 3},
        },
    )
    request = backend.requests[0]
    assert request.max_tokens == 7
    assert request.sampling == SamplingParams(temperature=0.3, top_k=5, top_p=0.9, min_p=0.05, seed=11)
    assert request.speculation == SpeculationOptions(
        enabled=False, verification=Verification.COUPLED, max_draft_tokens=3
    )
    assert request.stop_token_ids == (END,)


async def test_the_length_limit_is_a_finish_reason(serve: Serve) -> None:
    running = await serve(FakeBackend("abcdef"))
    answer = await running.openai.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=4)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("abcd", "length")
    assert answer.usage.completion_tokens == 4


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["END", ["zzz", "END"]])
async def test_stop_strings_are_found_across_rounds(serve: Serve, stream, stop) -> None:
    backend = FakeBackend("one E two EN three END four", chunk_tokens=2)
    running = await serve(backend)
    answer = await running.openai.chat.completions.create(
        model=MODEL, messages=HELLO, stop=stop, stream=stream
    )
    if stream:
        chunks = [chunk async for chunk in answer]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason, extra = chunks[-1].choices[0].finish_reason, chunks[-1].model_extra
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        extra = answer.model_extra
    assert (text, reason) == ("one E two EN three ", "stop")
    assert extra["speculation"]["rounds"] > 0
    assert (backend.cancelled, backend.running) == (1, 0)


async def test_models_are_listed_and_described(serve: Serve) -> None:
    running = await serve(FakeBackend(max_context_tokens=123))
    listed = [model async for model in running.openai.models.list()]
    assert [model.id for model in listed] == [MODEL]
    model = await running.openai.models.retrieve(MODEL)
    assert (model.object, model.owned_by) == ("model", "dspark")
    assert model.model_extra["max_model_len"] == 123
    with pytest.raises(openai.NotFoundError) as caught:
        await running.openai.models.retrieve("gpt/9")
    assert caught.value.code == "model_not_found"


async def test_sixteen_streams_at_once_get_their_own_answers(serve: Serve) -> None:
    backend = FakeBackend(lambda request: f"answer to {bytes(request.prompt_token_ids).decode()}")
    running = await serve(backend)

    async def ask(number: int) -> str:
        stream = await running.openai.completions.create(
            model=MODEL, prompt=f"question {number}", max_tokens=50, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    answers = await asyncio.gather(*(ask(number) for number in range(16)))
    assert answers == [f"answer to question {number}" for number in range(16)]
    assert backend.running == 0


async def test_an_error_in_the_middle_of_a_stream_reaches_the_client(serve: Serve) -> None:
    backend = FakeBackend("abcdef")
    backend.error, backend.error_after_chunks = RuntimeError("secret path"), 1
    running = await serve(backend)
    stream = await running.openai.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    assert [(await anext(stream)).choices[0].delta.content for _ in range(2)] == ["", "abc"]
    with pytest.raises(openai.APIError, match="internal error, reference") as caught:
        await anext(stream)
    assert "secret" not in str(caught.value.body)


async def test_a_request_has_variables_of_its_own_for_the_chat_template(serve: Serve) -> None:
    backend = FakeBackend("ok")
    template = TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}<none>{% endif %}"
    running = await serve(backend, chat_template=template)
    for extra in ({}, {"chat_template_kwargs": {"enable_thinking": False}}):
        await running.openai.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], extra_body=extra
        )
    plain, asked = (request.prompt_token_ids for request in backend.requests)
    assert asked == (*plain, *b"<none>")
