"""Several answers to one request over HTTP: whole, streamed, bounded, failing and abandoned."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import openai
import pytest

from dspark_core.errors import QueueFullError, UnavailableError
from dspark_core.records import GenerateChunk, GenerateRequest
from services.gateway.choices import seed_of_choice
from services.gateway.config import GatewayLimits
from tests.integration.gateway.conftest import MODEL, Serve
from tests.support.fake_generation import FakeBackend
from tests.support.polling import eventually

HELLO = [{"role": "user", "content": "hi"}]
LONG = [{"role": "user", "content": "hi" * 40}]


def place(request: GenerateRequest) -> int:
    """Index of the choice, from its request id."""
    _, _, index = request.request_id.partition("-")[2].partition("-")
    return int(index or 0)


def numbered(request: GenerateRequest) -> str:
    return f"answer {place(request)}" + "." * place(request)


class FailingBackend(FakeBackend):
    """One of the choices fails while the others are held."""

    def __init__(self, error: Exception) -> None:
        super().__init__("abcdef")
        self.failure = error

    async def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateChunk]:
        if place(request) == 2:
            await eventually(lambda: self.running == 2)
            raise self.failure
        async with contextlib.aclosing(super().generate(request)) as chunks:
            async for chunk in chunks:
                yield chunk


@pytest.mark.parametrize("messages", [HELLO, LONG], ids=["all at once", "the first one first"])
async def test_a_chat_has_as_many_choices_as_were_asked_for(serve: Serve, messages) -> None:
    backend = FakeBackend(numbered)
    running = await serve(backend)
    answer = await running.openai.chat.completions.create(
        model=MODEL, messages=messages, n=3, seed=7, stop="..", logprobs=True
    )
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert texts == ["answer 0", "answer 1.", "answer 2"]
    told = ["".join(e.token for e in choice.logprobs.content) for choice in answer.choices]
    assert told == texts
    alone = await running.openai.chat.completions.create(model=MODEL, messages=messages)
    assert answer.usage.prompt_tokens == alone.usage.prompt_tokens
    assert answer.usage.completion_tokens == len("answer 0.") + len("answer 1..") + len("answer 2..")
    assert answer.model_extra["speculation"]["rounds"] == 3 + 4 + 4
    asked = sorted(backend.requests[:3], key=place)
    assert [request.request_id for request in asked] == [answer.id, f"{answer.id}-1", f"{answer.id}-2"]
    assert [request.sampling.seed for request in asked] == [7, seed_of_choice(7, 1), seed_of_choice(7, 2)]


async def test_a_streamed_chat_tells_the_choice_of_each_chunk_and_the_usage_once(serve: Serve) -> None:
    running = await serve(FakeBackend(numbered))
    stream = await running.openai.chat.completions.create(
        model=MODEL, messages=HELLO, n=3, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = [chunk async for chunk in stream]
    texts, roles, ends = ["", "", ""], [0, 0, 0], [0, 0, 0]
    order = []
    for chunk in chunks:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role == "assistant"
        ends[choice.index] += choice.finish_reason == "stop"
        order.append(choice.index)
        assert chunk.usage is None
    assert texts == ["answer 0", "answer 1.", "answer 2.."]
    assert roles == ends == [1, 1, 1]
    assert order != sorted(order)  # no choice waits for the previous one
    assert last.choices == []
    assert last.usage.completion_tokens == sum(len(text) + 1 for text in texts)
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_completions_too(serve: Serve, stream) -> None:
    running = await serve(FakeBackend(numbered))
    fields = {"model": MODEL, "prompt": "p", "n": 2, "logprobs": 0, "extra_body": {"best_of": 2}}
    if stream:
        texts, offsets = ["", ""], [[], []]
        async for chunk in await running.openai.completions.create(**fields, stream=True):
            (choice,) = chunk.choices
            texts[choice.index] += choice.text
            offsets[choice.index] += choice.logprobs.text_offset if choice.logprobs else []
    else:
        answer = await running.openai.completions.create(**fields)
        assert [choice.index for choice in answer.choices] == [0, 1]
        texts = [choice.text for choice in answer.choices]
        offsets = [choice.logprobs.text_offset for choice in answer.choices]
        assert answer.usage.prompt_tokens == 1
    assert texts == ["answer 0", "answer 1."]
    assert offsets == [[*range(8)], [*range(9)]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompts", [["a", "bc", "d"], [[5], [6, 7], [8]]])
async def test_completions_of_several_prompts_number_their_answers_prompt_by_prompt(
    serve: Serve, prompts, stream
) -> None:
    backend = FakeBackend("x")
    running = await serve(backend)
    fields = {"model": MODEL, "prompt": prompts, "n": 2, "seed": 9, "stream": stream}
    if stream:
        fields["stream_options"] = {"include_usage": True}
        chunks = [chunk async for chunk in await running.openai.completions.create(**fields)]
        ended = {choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason}
        usage = chunks[-1].usage
    else:
        answer = await running.openai.completions.create(**fields)
        assert [choice.index for choice in answer.choices] == [*range(6)]
        ended, usage = {choice.index for choice in answer.choices}, answer.usage
    assert ended == {*range(6)}
    asked = sorted(backend.requests, key=lambda request: request.request_id)
    assert len({request.request_id for request in asked}) == 6
    first = asked[0].request_id
    seeds = {request.request_id.removeprefix(first): request.sampling.seed for request in asked}
    assert seeds == {"": 9, "-1": seeds["-1"], ".1": 9, ".1-1": seeds["-1"], ".2": 9, ".2-1": seeds["-1"]}
    assert usage.prompt_tokens == sum(
        len(request.prompt_token_ids) for request in asked if not request.request_id.endswith("-1")
    )


async def test_more_prompts_than_the_gateway_answers_are_refused(serve: Serve) -> None:
    backend = FakeBackend()
    running = await serve(backend, limits=GatewayLimits(max_choices=3))
    with pytest.raises(openai.BadRequestError, match="2 prompts, times n, must be <= 3") as refused:
        await running.openai.completions.create(model=MODEL, prompt=["a", "b"], n=2)
    assert refused.value.param == "prompt"
    assert backend.requests == []


@pytest.mark.parametrize(
    "limits",
    [GatewayLimits(max_choices=2), GatewayLimits(max_running_requests=1, max_waiting_requests=1)],
)
async def test_more_choices_than_the_gateway_gives_are_refused(serve: Serve, limits) -> None:
    backend = FakeBackend()
    running = await serve(backend, limits=limits)
    with pytest.raises(openai.BadRequestError, match="n must be <= 2") as refused:
        await running.openai.chat.completions.create(model=MODEL, messages=HELLO, n=3)
    assert refused.value.param == "n"
    assert backend.requests == []


async def test_every_choice_takes_a_place_and_all_or_none_get_one(serve: Serve) -> None:
    backend = FakeBackend("ok")
    backend.hold_after_chunks = 0
    running = await serve(backend, limits=GatewayLimits(max_running_requests=2, max_waiting_requests=1))
    create = running.openai.chat.completions.create
    first = asyncio.create_task(create(model=MODEL, messages=HELLO, n=2))
    await eventually(lambda: running.gateway.admission.running == 2)
    with pytest.raises(openai.RateLimitError, match="no room for 2 answers: 2 requests are here, 2 of"):
        await create(model=MODEL, messages=HELLO, n=2)
    assert len(backend.requests) == 2
    third = asyncio.create_task(create(model=MODEL, messages=HELLO))
    await eventually(lambda: running.gateway.admission.waiting == 1)
    backend.release.set()
    assert len((await first).choices) == 2
    await third
    assert (running.gateway.admission.running, running.gateway.admission.waiting) == (0, 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UnavailableError("every verifier is gone"), openai.InternalServerError),
        (QueueFullError("a speed floor would break"), openai.RateLimitError),
    ],
)
async def test_when_one_choice_fails_the_others_are_cancelled(serve: Serve, error, kind, stream) -> None:
    backend = FailingBackend(error)
    backend.hold_after_chunks = 0
    running = await serve(backend)
    with pytest.raises(kind, match=str(error)):
        await running.openai.chat.completions.create(model=MODEL, messages=HELLO, n=3, stream=stream)
    assert (backend.running, backend.cancelled) == (0, 2)
    assert (running.gateway.admission.running, running.gateway.admission.waiting) == (0, 0)


@pytest.mark.parametrize("hold_after", [0, 1])
@pytest.mark.parametrize("messages", [HELLO, LONG], ids=["short", "long"])
async def test_a_client_that_leaves_cancels_every_choice(serve: Serve, hold_after, messages) -> None:
    backend = FakeBackend("abcdef")
    backend.hold_after_chunks = hold_after
    running = await serve(backend)
    asked = asyncio.create_task(running.openai.chat.completions.create(model=MODEL, messages=messages, n=3))
    began = 1 if messages is LONG and hold_after == 0 else 3
    await eventually(lambda: backend.running == began)
    asked.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asked
    await eventually(lambda: backend.running == 0)
    assert backend.cancelled == began
    await eventually(lambda: running.gateway.admission.running + running.gateway.admission.waiting == 0)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("x" * 300, r"prompt\[2\] has (at least )?\d+ tokens"),
        ([999], r"prompt\[2\] token ids must be in .* got 999"),
    ],
)
async def test_of_several_prompts_the_one_that_is_wrong_is_named(serve: Serve, prompt, message) -> None:
    running = await serve(FakeBackend("yes"))
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        await running.openai.completions.create(model=MODEL, prompt=["a", "b", prompt])
    assert refused.value.param == "prompt[2]"
