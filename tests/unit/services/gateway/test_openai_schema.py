"""Request bodies: which are accepted or refused, and that refusals name the field and its value."""

import json

import pytest
from pydantic import ValidationError

from dspark_core.errors import InvalidRequestError
from dspark_core.output_rules import Grammar, GrammarKind, LogitAdjustments
from dspark_core.records import SpeculationOptions, Verification
from services.gateway.http.errors import invalid_body
from services.gateway.openai.schema import ChatCompletionBody, CompletionBody
from services.gateway.requests import ChatRole, TextRequest

USER = [{"role": "user", "content": "hi"}]


def chat(**fields: object) -> TextRequest:
    body = {"model": "m", "messages": USER, **fields}
    return parse(ChatCompletionBody, json.dumps(body))


def completion(**fields: object) -> TextRequest:
    return parse(CompletionBody, json.dumps({"model": "m", "prompt": "p", **fields}))


def parse(body_type, text: str) -> TextRequest:
    try:
        return body_type.model_validate_json(text).to_requests("id")[0]
    except ValidationError as error:
        raise invalid_body(error) from error


def test_all_supported_chat_fields_arrive() -> None:
    request = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []},
        ],
        max_completion_tokens=5,
        temperature=0,
        top_p=0.5,
        top_k=3,
        min_p=0.1,
        seed=7,
        stop="x",
        speculation={"enabled": False, "verification": "coupled", "max_draft_tokens": 2},
    )
    assert [(entry.role, entry.content) for entry in request.prompt.messages] == [
        (ChatRole.SYSTEM, "be brief"),
        (ChatRole.USER, "ab"),
        (ChatRole.ASSISTANT, "c"),
    ]
    assert (request.max_tokens, request.temperature, request.top_p) == (5, 0, 0.5)
    assert (request.top_k, request.min_p, request.seed, request.stop) == (3, 0.1, 7, ("x",))
    assert request.speculation == SpeculationOptions(
        enabled=False, verification=Verification.COUPLED, max_draft_tokens=2
    )


def test_what_clients_add_to_answers_they_send_back_says_nothing_new() -> None:
    answer = {"role": "assistant", "content": "c"}
    for added in ({"parsed": {"a": 1}}, {"provider_specific_fields": {"refusal": None}}):
        assert chat(messages=[{**answer, **added}]).prompt == chat(messages=[answer]).prompt


def test_refusals_of_earlier_answers_are_what_was_said() -> None:
    said = [{"type": "text", "text": "No: "}, {"type": "refusal", "refusal": "I won't."}]
    for fields in ({"content": said}, {"content": None, "refusal": "No: I won't."}):
        (message,) = chat(messages=[{"role": "assistant", **fields}]).prompt.messages
        assert message.content == "No: I won't."


def test_fields_that_ask_for_nothing_are_accepted() -> None:
    request = chat(
        n=1,
        logprobs=False,
        top_logprobs=0,
        presence_penalty=0.0,
        frequency_penalty=0,
        logit_bias={},
        tools=[],
        tool_choice="none",
        parallel_tool_calls=True,
        functions=[],
        reasoning_effort="none",
        verbosity="medium",
        response_format={"type": "text"},
        user="u",
        metadata={"a": "b"},
        prompt_cache_retention="24h",
        stop=None,
        stream_options=None,
    )
    assert request == chat()


def test_several_answers_may_be_asked_for() -> None:
    assert chat(n=3).choices == 3
    assert completion(n=2, best_of=2).choices == 2
    assert chat(n=None).choices == completion(best_of=1).choices == 1


def test_logits_are_adjusted_and_told_of_as_asked() -> None:
    request = chat(
        presence_penalty=1,
        frequency_penalty=-0.5,
        repetition_penalty=1.25,
        logit_bias={"17": 2, "4": -100},
        min_tokens=3,
        logprobs=True,
        top_logprobs=5,
    )
    assert request.adjustments == LogitAdjustments(
        presence_penalty=1.0,
        frequency_penalty=-0.5,
        repetition_penalty=1.25,
        logit_bias=((17, 2.0), (4, -100.0)),
        min_tokens=3,
    )
    assert request.top_logprobs == 5
    assert [chat(logprobs=value).top_logprobs for value in (None, False, True)] == [None, None, 0]
    assert [completion(logprobs=value).top_logprobs for value in (None, 0, 2)] == [None, 0, 2]


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type": "object"}'),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
            "json_schema",
            json.dumps(SCHEMA),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", json.dumps(SCHEMA)),
        ({"structured_outputs": {"json": '{"type": "null"}'}}, "json_schema", '{"type": "null"}'),
        ({"structured_outputs": {"regex": "[a-z]+"}}, "regex", "[a-z]+"),
        (
            {"structured_outputs": {"choice": ["yes", 'n"o']}},
            "lark",
            'start: CHOICE\nCHOICE: "yes" | "n\\"o"',
        ),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark", 'start: "a"'),
    ],
)
def test_answers_may_have_to_be_something(fields, kind, text) -> None:
    for request in (chat(**fields), completion(**fields)):
        assert request.grammar == Grammar(kind=GrammarKind(kind), text=text)
        assert request.grammar_field == next(iter(fields))
    assert chat(response_format={"type": "text"}, structured_outputs={}).grammar is None


def test_completion_prompts_are_text_or_token_ids() -> None:
    assert completion(prompt="once").prompt == "once"
    assert completion(prompt=[1, 2]).prompt == (1, 2)


def test_a_list_of_one_prompt_is_that_prompt() -> None:
    assert completion(prompt=["once"]).prompt == "once"
    assert completion(prompt=[[1, 2]]).prompt == (1, 2)


def test_stop_tokens_are_ignored_only_on_demand() -> None:
    assert [completion(ignore_eos=value).ignore_eos for value in (None, False, True)] == [False, False, True]
    assert completion().max_tokens == 16
    assert completion(max_tokens=3, stop=["a", "b"]).stop == ("a", "b")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": "hi"}, "messages", "got 'hi'"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "got 'robot'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required but missing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "got None"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages[0].content", "required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content",
            "part 0 must be of type 'text' or 'refusal', got 'image_url'",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "refusal": "y"}]},
            "messages[0].refusal",
            "belongs to messages of the assistant",
        ),
        ({"model": 3}, "model", "got 3"),
        ({"max_tokens": "ten"}, "max_tokens", "got 'ten'"),
        ({"max_tokens": 1.5}, "max_tokens", "got 1.5"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "contradict"),
        ({"temperature": "hot"}, "temperature", "got 'hot'"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4 strings, got 5"),
        ({"stop": [""]}, "stop", "1 to 1024 characters, got '' with 0"),
        ({"stop": ["x" * 1025]}, "stop", "with 1025"),
        ({"n": 0}, "n", "n must be >= 1, got 0"),
        ({"n": 1.5}, "n", "got 1.5"),
        ({"logprobs": 1}, "logprobs", "got 1"),
        ({"top_logprobs": 3}, "top_logprobs", "top_logprobs 3 needs logprobs to be true"),
        ({"presence_penalty": 2.5}, "presence_penalty", "in [-2, 2], got 2.5"),
        ({"frequency_penalty": -3}, "frequency_penalty", "in [-2, 2], got -3"),
        ({"repetition_penalty": 0}, "repetition_penalty", "in [0.01, 100], got 0"),
        ({"logit_bias": {"1": 500}}, "logit_bias", "in [-100, 100], got 500.0 for token 1"),
        ({"logit_bias": {"the": 5}}, "logit_bias", "keys must be token ids, got 'the'"),
        ({"logit_bias": {"-1": 5}}, "logit_bias", "keys must be token ids, got '-1'"),
        ({"min_tokens": -1}, "min_tokens", "got -1"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "must be <= max_tokens (8), got 9"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "got 'xml'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "'json_schema' needs json_schema"),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "n", "schema": {}}}},
            "response_format",
            "'text' cannot have json_schema",
        ),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "got regex, choice"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "texts to choose from, got []"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", "unrecognised"),
        ({"structured_outputs": {"regex": " "}}, "structured_outputs", "structured_outputs must be a text"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "contradict",
        ),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only be set when stream is true"),
        ({"max_token": 3}, "max_token", "unrecognised request argument"),
        ({"speculation": {"verification": "maybe"}}, "speculation.verification", "got 'maybe'"),
        ({"speculation": {"max_draft_tokens": -1}}, "speculation.max_draft_tokens", "got -1"),
        ({"seed": -(2**63) - 1}, "seed", "in [-9223372036854775808, 9223372036854775807]"),
        ({"max-tokens": 5}, "max-tokens", "unrecognised request argument: max-tokens"),
        ({"str": 1}, "str", "unrecognised request argument: str"),
        ({"x" * 900: 1}, "x" * 100 + "…", "unrecognised"),
        ({"messages": [{**USER[0], "foo-bar": 1}]}, "messages[0].foo-bar", "messages[0].foo-bar"),
    ],
)
def test_a_refused_chat_body_names_field_and_value(fields, param, message) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(**fields)
    assert caught.value.field == param
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": ""}, "prompt", "must not be empty"),
        ({"prompt": []}, "prompt", "must not be empty"),
        ({"prompt": ["a", 2]}, "prompt[1]", "string"),
        ({"prompt": ["", "a"]}, "prompt[0]", "prompt[0] must not be empty"),
        ({"prompt": ["a", [1], []]}, "prompt[2]", "prompt[2] must not be empty"),
        ({"prompt": [[1], ["b"]]}, "prompt", "token ids must be integers, not 'b'"),
        ({"prompt": ["a"] * 1025}, "prompt", "1024"),
        ({"prompt": [1, "a"]}, "prompt", "token ids must be integers, not 'a'"),
        ({"prompt": [1, True]}, "prompt", "token ids must be integers, not True"),
        ({"prompt": [["a"]]}, "prompt", "token ids must be integers, not 'a'"),
        ({"prompt": 5}, "prompt", "got 5"),
        ({"ignore_eos": 1}, "ignore_eos", "got 1"),
        ({"echo": True}, "echo", "True is not supported"),
        ({"best_of": 3}, "best_of", "3 is not supported; leave it out or send 1, as n"),
        ({"best_of": 3, "n": 2}, "best_of", "3 is not supported; leave it out or send 2, as n"),
        ({"suffix": "z"}, "suffix", "'z' is not supported"),
        ({"logprobs": True}, "logprobs", "got True"),
        ({"logprobs": 21}, "logprobs", "in [0, 20], got 21"),
        ({"messages": USER}, "messages", "unrecognised request argument"),
    ],
)
def test_a_refused_completion_body_names_field_and_value(fields, param, message) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(**fields)
    assert caught.value.field == param
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", '{"model": }', "\xff", "[1]", "3", "null"])
def test_a_body_that_is_not_a_json_object_is_refused(text) -> None:
    with pytest.raises(InvalidRequestError, match=r"request body is (not valid JSON|wrong)"):
        parse(ChatCompletionBody, text)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(InvalidRequestError, match="model is required but missing") as caught:
        parse(ChatCompletionBody, json.dumps({"messages": USER}))
    assert caught.value.field == "model"
