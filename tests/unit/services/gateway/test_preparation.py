from dataclasses import replace

import pytest

from dspark_core.errors import (
    ContextLengthError,
    InvalidRequestError,
    UnavailableError,
    UnknownModelError,
)
from dspark_core.records import SamplingParams, SpeculationOptions
from dspark_core.tokenization.tokenizer import GenerationDefaults
from services.gateway.preparation import PreparedRequest, RequestPreparer
from services.gateway.requests import ChatMessage, ChatRole, Conversation, TextRequest
from services.gateway.served_model import ServedModel
from tests.support.byte_tokenizer import END, START, VOCAB, byte_tokenizer
from tests.support.fake_generation import FakeBackend

PLAIN = TextRequest(request_id="r", model="m", prompt="hello")


async def prepare(request: TextRequest, *, limit: int | None = None, **tokenizer: object) -> PreparedRequest:
    backend = FakeBackend(max_context_tokens=20)
    return await RequestPreparer(ServedModel("m", backend, limit), byte_tokenizer(**tokenizer)).prepare(
        request
    )


async def test_a_conversation_is_rendered_through_the_chat_template() -> None:
    message = ChatMessage(role=ChatRole.USER, content="x")
    prepared = await prepare(replace(PLAIN, prompt=Conversation(messages=(message,))))
    expected = (START, *b"user\nx", END, START, *b"assistant\n")
    assert prepared.request.prompt_token_ids == expected
    assert prepared.request.stop_token_ids == (END,)
    assert prepared.request.request_id == "r"


async def test_stop_tokens_can_be_ignored() -> None:
    assert (await prepare(replace(PLAIN, ignore_eos=True))).request.stop_token_ids == ()


async def test_token_ids_are_taken_as_they_are() -> None:
    prepared = await prepare(replace(PLAIN, prompt=(5, VOCAB - 1)))
    assert prepared.request.prompt_token_ids == (5, VOCAB - 1)


async def test_unset_sampling_takes_the_models_defaults_and_then_neutral_values() -> None:
    assert (await prepare(PLAIN)).request.sampling == SamplingParams()
    defaults = GenerationDefaults(temperature=0.6, top_k=20, top_p=0.95)
    own = (await prepare(PLAIN, defaults=defaults)).request.sampling
    assert own == SamplingParams(temperature=0.6, top_k=20, top_p=0.95)
    asked = replace(PLAIN, temperature=0.0, top_k=0, top_p=1.0, min_p=0.2, seed=3)
    given = (await prepare(asked, defaults=defaults)).request.sampling
    assert given == SamplingParams(temperature=0.0, min_p=0.2, seed=3)


async def test_max_tokens_never_exceeds_what_fits() -> None:
    assert (await prepare(PLAIN)).request.max_tokens == 15
    assert (await prepare(replace(PLAIN, max_tokens=3))).request.max_tokens == 3
    assert (await prepare(replace(PLAIN, max_tokens=10**20))).request.max_tokens == 15
    assert (await prepare(PLAIN, limit=8)).request.max_tokens == 3
    assert (await prepare(PLAIN, limit=99)).request.max_tokens == 15


async def test_numbers_too_large_for_the_wire_mean_no_bound() -> None:
    asked = replace(PLAIN, top_k=10**12, speculation=SpeculationOptions(max_draft_tokens=10**12))
    request = (await prepare(asked)).request
    assert request.sampling.top_k == VOCAB
    assert request.speculation.max_draft_tokens == 20


@pytest.mark.parametrize(
    ("fields", "kind", "field", "message"),
    [
        ({"model": "other"}, UnknownModelError, "model", "'other' does not exist here, only 'm'"),
        (
            {"prompt": "x" * 20},
            ContextLengthError,
            "prompt",
            "has 20 tokens.* maximum context length is 20 tokens",
        ),
        ({"prompt": (1, VOCAB)}, InvalidRequestError, "prompt", rf"in \[0, {VOCAB - 1}\], got {VOCAB}"),
        ({"prompt": (-1,)}, InvalidRequestError, "prompt", "got -1"),
        ({"max_tokens": 0}, InvalidRequestError, "max_tokens", ">= 1, got 0"),
        ({"max_tokens": -5}, InvalidRequestError, "max_tokens", ">= 1, got -5"),
        ({"temperature": -0.1}, InvalidRequestError, "temperature", "got -0.1"),
        ({"temperature": float("nan")}, InvalidRequestError, "temperature", "got nan"),
        ({"top_p": 0.0}, InvalidRequestError, "top_p", "got 0.0"),
        ({"top_k": -1}, InvalidRequestError, "top_k", "got -1"),
        ({"min_p": 2.0}, InvalidRequestError, "min_p", "got 2.0"),
        ({"seed": 2**63}, InvalidRequestError, "seed", "got 9223372036854775808"),
    ],
)
async def test_a_wrong_value_is_refused_with_its_name(fields, kind, field, message) -> None:
    with pytest.raises(kind, match=message) as caught:
        await prepare(replace(PLAIN, **fields))
    assert caught.value.field == field


async def test_the_last_prompt_that_fits_leaves_one_token() -> None:
    assert (await prepare(replace(PLAIN, prompt="x" * 19))).request.max_tokens == 1


async def test_a_template_that_refuses_is_the_callers_error() -> None:
    conversation = Conversation(messages=(ChatMessage(role=ChatRole.SYSTEM, content="x"),))
    template = "{{ raise_exception('no system messages') }}"
    with pytest.raises(InvalidRequestError, match="no system messages"):
        await prepare(replace(PLAIN, prompt=conversation), chat_template=template)


async def test_without_a_verifier_nothing_can_be_checked() -> None:
    backend = FakeBackend()
    backend.describe_error = UnavailableError("no verifier")
    with pytest.raises(UnavailableError):
        await RequestPreparer(ServedModel("m", backend), byte_tokenizer()).prepare(PLAIN)
