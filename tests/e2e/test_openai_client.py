"""OpenAI's official client with the embedded default."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from dspark_core.model_paths import resolve_model_path
from dspark_core.tokenization.loading import load_tokenizer
from services.embedded.stack import EmbeddedStack

pytestmark = pytest.mark.xdist_group("e2e")

MODEL = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]


@pytest.fixture
def client(stack: EmbeddedStack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="unused", max_retries=0) as one:
        yield one


def test_a_chat_answers_correctly_and_tells_what_speculation_did(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=20)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    speculation = answer.model_extra["speculation"]
    assert speculation["committed_tokens"] == answer.usage.completion_tokens - 1
    assert speculation["accepted_length"] >= 1.0


def test_streaming_gives_the_same_text_in_pieces(client: openai.OpenAI) -> None:
    fields = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**fields).choices[0]
    chunks = list(client.chat.completions.create(**fields, stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason


def test_seed_makes_sampling_repeatable_and_other_seeds_differ(client: openai.OpenAI) -> None:
    story = [{"role": "user", "content": "Tell me a story about a dragon."}]

    def sample(seed: int) -> str:
        answer = client.chat.completions.create(
            model=MODEL, messages=story, temperature=1.0, top_p=0.9, max_tokens=24, seed=seed
        )
        return answer.choices[0].message.content or ""

    assert sample(7) == sample(7) != sample(8)


def test_stop_and_max_tokens_end_the_answer(client: openai.OpenAI) -> None:
    counting = [{"role": "user", "content": "Count from 1 to 10, separated by commas."}]
    free = client.chat.completions.create(model=MODEL, messages=counting, temperature=0, max_tokens=40)
    text = free.choices[0].message.content or ""
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    stopped = client.chat.completions.create(
        model=MODEL, messages=counting, temperature=0, max_tokens=40, stop=[stop]
    )
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    short = client.chat.completions.create(model=MODEL, messages=counting, temperature=0, max_tokens=5)
    assert short.choices[0].finish_reason == "length"
    assert short.usage is not None
    assert short.usage.completion_tokens == 5


def test_text_completions_and_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    answer = client.completions.create(model=MODEL, prompt="1, 2, 3, 4,", temperature=0, max_tokens=6)
    assert "5" in answer.choices[0].text


def test_sixteen_concurrent_streams_finish(client: openai.OpenAI) -> None:
    def stream(index: int) -> tuple[int, str | None]:
        chunks = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": f"Write {index} facts about the number {index}."}],
            temperature=0.7,
            max_tokens=20,
            stream=True,
        )
        seen = list(chunks)
        text = "".join(c.choices[0].delta.content or "" for c in seen if c.choices)
        return len(text), seen[-1].choices[0].finish_reason

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(stream, range(16)))
    assert all(length > 0 and reason in ("stop", "length") for length, reason in results)


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model"),
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"temperature": -0.5}, openai.BadRequestError, "temperature"),
        ({"top_p": 1.5}, openai.BadRequestError, "top_p"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, openai.BadRequestError, "messages"),
    ],
)
def test_bad_input_is_refused_by_field(client, fields, error, param) -> None:
    with pytest.raises(error) as refused:
        client.chat.completions.create(**{"model": MODEL, "messages": QUESTION, **fields})
    assert refused.value.param == param
    if param == "messages" and fields["messages"]:
        assert refused.value.code == "context_length_exceeded"
        assert "8192" in str(refused.value)


PENALISED = {"presence_penalty": 0.6, "frequency_penalty": 0.8, "logit_bias": {"28": -2.0}, "min_tokens": 12}
"""Fields that the client does not know are passed in its `extra_body`."""


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.9, "seed": 5}])
def test_penalties_change_the_answer_and_speculation_does_not(
    client: openai.OpenAI, sampling: dict[str, float]
) -> None:
    poem = [{"role": "user", "content": "Write a poem in which every line begins with the word rain."}]

    def answer(speculate: bool, **fields: object) -> str:
        extra = {"speculation": {"enabled": speculate}, **fields}
        create = client.chat.completions.create
        whole = create(model=MODEL, messages=poem, max_tokens=64, **sampling, extra_body=extra)
        return whole.choices[0].message.content or ""

    plain, penalised = answer(True), answer(True, **PENALISED)
    assert plain != penalised == answer(False, **PENALISED)
    assert answer(True, repetition_penalty=1.5) == answer(False, repetition_penalty=1.5) != plain


def test_a_banned_word_is_not_said_and_logprobs_tell_what_would_have_been(client: openai.OpenAI) -> None:
    fields = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 12}
    free = client.chat.completions.create(**fields, logprobs=True, top_logprobs=2).choices[0]
    assert free.logprobs is not None
    told = free.logprobs.content or []
    assert "".join(entry.token for entry in told) == free.message.content
    for entry in told:  # greedy: the chosen token is the likeliest
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)
        assert entry.top_logprobs[1].logprob <= entry.logprob <= 0.0
    name = next(entry.token for entry in told if "Paris" in entry.token)
    text = client.chat.completions.create(**fields, extra_body={"min_tokens": 12}).choices[0].message.content
    assert name in (text or "")
    tokenizer = load_tokenizer(resolve_model_path(MODEL))
    (token_id,) = tokenizer.encode(name)
    banned = client.chat.completions.create(**fields, logit_bias={str(token_id): -100}).choices[0]
    assert name not in (banned.message.content or "")


PERSON = {
    "type": "object",
    "properties": {
        "full_name": {"type": "string", "maxLength": 30},
        "year_of_birth": {"type": "integer", "minimum": 1000, "maximum": 2100},
        "occupation": {"enum": ["scientist", "writer", "musician"]},
    },
    "required": ["full_name", "year_of_birth", "occupation"],
    "additionalProperties": False,
}
ABOUT = [{"role": "user", "content": "Tell me about Marie Curie, as JSON."}]


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 3}, {"temperature": 1.0}]
)
def test_an_answer_keeps_to_its_schema_and_speculation_changes_nothing(
    client: openai.OpenAI, sampling: dict[str, float]
) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}

    def answer(**extra: object) -> tuple[str, dict[str, float]]:
        create = client.chat.completions.create
        whole = create(
            model=MODEL, messages=ABOUT, max_tokens=90, response_format=shape, **sampling, extra_body=extra
        )
        assert whole.choices[0].finish_reason == "stop"
        return whole.choices[0].message.content or "", whole.model_extra["speculation"]

    text, speculation = answer()
    person = json.loads(text)
    assert list(person) == PERSON["required"]
    assert 1000 <= person["year_of_birth"] <= 2100
    assert person["occupation"] in PERSON["properties"]["occupation"]["enum"]
    assert speculation["lookup_accepted_tokens"] > 0  # field names, which the schema forces
    if "seed" in sampling or not sampling["temperature"]:
        assert answer(speculation={"enabled": False})[0] == text


def test_an_answer_may_be_one_of_some_or_match_an_expression(client: openai.OpenAI) -> None:
    def answer(question: str, **structured: object) -> str:
        whole = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=30,
            extra_body={"structured_outputs": structured},
        )
        assert whole.choices[0].finish_reason == "stop"
        return whole.choices[0].message.content or ""

    assert answer("Is the sun hot or cold?", choice=["hot", "cold"]) in ("hot", "cold")
    assert re.fullmatch("[0-9]{3}-[0-9]{4}", answer("A telephone number?", regex="[0-9]{3}-[0-9]{4}"))
