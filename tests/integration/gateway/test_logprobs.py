"""Log-probabilities through the official client and over gRPC, whole and streamed."""

from __future__ import annotations

import pytest
from dspark_proto.v1 import common_pb2, gateway_pb2

from dspark_core.output_rules import LogitAdjustments
from tests.integration.gateway.conftest import MODEL, Serve
from tests.support.byte_tokenizer import END
from tests.support.fake_generation import FakeBackend

HELLO = [{"role": "user", "content": "hi"}]
TEXT = "né 🙂"
TOKENS = [*TEXT.encode()]


@pytest.mark.parametrize("stream", [False, True])
async def test_of_a_chat(serve: Serve, stream: bool) -> None:
    running = await serve(FakeBackend(TEXT, chunk_tokens=2))
    fields = {"model": MODEL, "messages": HELLO, "logprobs": True, "top_logprobs": 2}
    if stream:
        chunks = [
            chunk async for chunk in await running.openai.chat.completions.create(**fields, stream=True)
        ]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
        told = [entry for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    else:
        answer = await running.openai.chat.completions.create(**fields)
        assert answer.choices[0].message.content == TEXT
        told = answer.choices[0].logprobs.content
    assert [byte for entry in told for byte in entry.bytes] == TOKENS  # without the end of the turn
    assert [entry.token for entry in told[:2]] == ["n", "\ufffd"]  # half a character
    assert [entry.logprob for entry in told] == [-token / 100 for token in TOKENS]
    assert [other.bytes for other in told[0].top_logprobs] == [[TOKENS[0]], [TOKENS[0] + 1]]
    assert told[0].top_logprobs[1].logprob == -(TOKENS[0] + 1) / 100


@pytest.mark.parametrize("stream", [False, True])
async def test_of_a_completion(serve: Serve, stream: bool) -> None:
    running = await serve(FakeBackend("abcde", chunk_tokens=2))
    fields = {"model": MODEL, "prompt": "p", "logprobs": 2, "max_tokens": 9}
    if stream:
        chunks = [chunk async for chunk in await running.openai.completions.create(**fields, stream=True)]
        parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    else:
        parts = [(await running.openai.completions.create(**fields)).choices[0].logprobs]
    assert [token for part in parts for token in part.tokens] == [*"abcde"]
    assert [offset for part in parts for offset in part.text_offset] == [0, 1, 2, 3, 4]
    assert [value for part in parts for value in part.token_logprobs] == [-token / 100 for token in b"abcde"]
    assert parts[0].top_logprobs[0] == {"a": -0.97, "b": -0.98}


@pytest.mark.parametrize("stream", [False, True])
async def test_offsets_are_characters_of_the_text_whatever_they_are_spread_over(
    serve: Serve, stream: bool
) -> None:
    running = await serve(
        FakeBackend("né 🙂!", chunk_tokens=2)
    )  # one token per byte: the emoji spans several chunks
    fields = {"model": MODEL, "prompt": "p", "logprobs": 0, "max_tokens": 20}
    if stream:
        chunks = [chunk async for chunk in await running.openai.completions.create(**fields, stream=True)]
        choices = [chunk.choices[0] for chunk in chunks]
    else:
        choices = (await running.openai.completions.create(**fields)).choices
    assert "".join(choice.text for choice in choices) == "né 🙂!"
    offsets = [offset for choice in choices if choice.logprobs for offset in choice.logprobs.text_offset]
    assert offsets == [0, 1, 1, 2, 3, 3, 3, 3, 4]


async def test_the_chosen_token_of_a_completion_is_among_the_top(serve: Serve) -> None:
    running = await serve(FakeBackend("ab"))
    answer = await running.openai.completions.create(model=MODEL, prompt="p", logprobs=0)
    assert answer.choices[0].logprobs.top_logprobs == [{"a": -0.97}, {"b": -0.98}]


async def test_none_are_told_unless_asked_for(serve: Serve) -> None:
    running = await serve(FakeBackend())
    answer = await running.openai.chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.choices[0].logprobs is None
    assert (await running.openai.completions.create(model=MODEL, prompt="p")).choices[0].logprobs is None


async def test_over_grpc_with_adjustments(serve: Serve) -> None:
    backend = FakeBackend("ab", chunk_tokens=1)
    running = await serve(backend)
    message = gateway_pb2.GatewayGenerateRequest(
        prompt="p",
        top_logprobs=1,
        adjustments=common_pb2.LogitAdjustments(
            logit_bias=[common_pb2.TokenBias(token_id=4, bias=-1.5)], presence_penalty=0.25, min_tokens=2
        ),
    )
    chunks = [chunk async for chunk in running.stub.Generate(message, timeout=20)]
    assert [token for chunk in chunks for token in chunk.token_ids] == [*b"ab", END]
    told = [entry for chunk in chunks for entry in chunk.logprobs]
    assert [(entry.logprob, list(entry.top_token_ids)) for entry in told] == [(-0.97, [97]), (-0.98, [98])]
    assert backend.requests[0].adjustments == LogitAdjustments(
        logit_bias=((4, -1.5),), presence_penalty=0.25, min_tokens=2
    )
