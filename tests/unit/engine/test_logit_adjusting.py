"""Penalties and biases act as if tokens were decoded one by one, however they are drafted and verified."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from dspark_core.errors import InvalidRequestError
from dspark_core.output_rules import LogitAdjustments
from dspark_core.records import GenerateRequest, SamplingParams, SpeculationOptions, TokenLogprobs
from tests.unit.engine.tiny import (
    VOCAB,
    ScriptedDrafts,
    make_loop,
    naive_logits,
    prompts,
    request,
    run,
    tiny_decoder,
    tiny_engine,
)

TOKENS = 16
PROMPTS = {f"r{i}": prompt for i, prompt in enumerate(prompts(5, seed=21))}
SEEDED = SamplingParams(temperature=1.1, seed=3)
STOPS = (28, 13)

CASES = {
    "presence": LogitAdjustments(presence_penalty=1.5),
    "frequency": LogitAdjustments(frequency_penalty=0.7),
    "negative": LogitAdjustments(presence_penalty=-0.5, frequency_penalty=-1.3),
    "repetition": LogitAdjustments(repetition_penalty=1.4),
    "bias": LogitAdjustments(logit_bias=((5, 3.5), (9, -100.0), (60, 2.0))),
    "min_tokens": LogitAdjustments(min_tokens=9),
    "all": LogitAdjustments(
        logit_bias=((5, 2.5), (28, 1.0)),
        repetition_penalty=1.2,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        min_tokens=6,
    ),
}


def adjusted(logits: Tensor, asked: LogitAdjustments, prompt: Sequence[int], output: Sequence[int]) -> Tensor:
    """By the definitions of the OpenAI API and of `LogitAdjustments`, one token at a time."""
    logits = logits.clone()
    for token_id in range(VOCAB):
        value = logits[token_id]
        if token_id in STOPS and len(output) < asked.min_tokens:
            value = torch.tensor(-1e9)
        value = value + dict(asked.logit_bias).get(token_id, 0.0)
        if asked.repetition_penalty != 1.0 and (token_id in prompt or token_id in output):
            value = value / asked.repetition_penalty if value > 0 else value * asked.repetition_penalty
        count = list(output).count(token_id)
        if count:
            value = value - torch.tensor(asked.presence_penalty + asked.frequency_penalty * count)
        logits[token_id] = value
    return logits


def naive(asked: LogitAdjustments, prompt: Sequence[int], count: int = TOKENS) -> list[int]:
    decoder, output = tiny_decoder(), list[int]()
    while len(output) < count and not (output and output[-1] in STOPS):
        logits = naive_logits(decoder, [*prompt, *output])[-1]
        output.append(int(adjusted(logits, asked, prompt, output).argmax()))
    return output


def asking(asked: LogitAdjustments, **options: object) -> list[GenerateRequest]:
    return [
        dataclasses.replace(request(name, prompt, TOKENS, stop=STOPS, **options), adjustments=asked)  # type: ignore[arg-type]
        for name, prompt in PROMPTS.items()
    ]


def drafts_of(tokens: dict[str, list[int]], error_rate: float, apart: bool = False) -> ScriptedDrafts:
    lengths = {name: len(prompt) for name, prompt in PROMPTS.items()}
    return ScriptedDrafts(tokens, prompt_lengths=lengths, error_rate=error_rate, apart=apart)


@pytest.mark.parametrize("asked", CASES.values(), ids=CASES)
def test_greedy_output_is_the_adjusted_targets(asked: LogitAdjustments) -> None:
    expected = {name: naive(asked, prompt) for name, prompt in PROMPTS.items()}
    assert expected != {name: naive(LogitAdjustments(), prompt) for name, prompt in PROMPTS.items()}
    for error_rate in (0.0, 0.4):
        assert run(make_loop(drafts=drafts_of(expected, error_rate)), asking(asked)) == expected
    in_turns = make_loop(tiny_engine(num_pages=20), drafts_of(expected, 0.3, apart=True), cohorts=2)
    assert run(in_turns, asking(asked)) == expected


@pytest.mark.parametrize("asked", CASES.values(), ids=CASES)
def test_a_seed_still_makes_output_a_function_of_the_request(asked: LogitAdjustments) -> None:
    plain = asking(asked, sampling=SEEDED, speculation=SpeculationOptions(enabled=False))
    expected = {one.request_id: run(make_loop(), [one])[one.request_id] for one in plain}
    loop = make_loop(drafts=drafts_of(expected, 0.3))
    assert run(loop, asking(asked, sampling=SEEDED)) == expected


@pytest.mark.parametrize("sampling", [SamplingParams(temperature=0.0), SEEDED])
def test_another_verifier_goes_on_with_what_the_first_had_counted(sampling: SamplingParams) -> None:
    (whole,) = asking(CASES["all"], sampling=sampling)[:1]
    expected = run(make_loop(), [whole])[whole.request_id]
    for done in range(1, len(expected)):
        rest = dataclasses.replace(
            whole,
            prompt_token_ids=(*whole.prompt_token_ids, *expected[:done]),
            max_tokens=TOKENS - done,
            generated_tokens=done,
        )
        assert run(make_loop(), [rest])[whole.request_id] == expected[done:]


def test_sampled_output_keeps_the_adjusted_distribution() -> None:
    """Two tokens, the second through rejection of a uniform proposal, chi-square, p > 0.001."""
    prompt, asked = [5, 9, 2], LogitAdjustments(presence_penalty=2.0, logit_bias=((4, 1.0),))
    decoder = tiny_decoder()

    def law(output: list[int]) -> dict[int, float]:
        logits = adjusted(naive_logits(decoder, [*prompt, *output])[-1], asked, prompt, output).topk(3)
        return dict(zip(logits.indices.tolist(), logits.values.double().softmax(-1).tolist(), strict=True))

    exact = {(a, b): pa * pb for a, pa in law([]).items() for b, pb in law([a]).items()}
    count, seen = 2000, dict.fromkeys(exact, 0)
    sampling = SamplingParams(temperature=1.0, top_k=3)
    loop = make_loop(tiny_engine(decoder, num_pages=400), ScriptedDrafts(), max_running=64)
    for start in range(0, count, 250):
        batch = [
            dataclasses.replace(request(f"q{i}", prompt, 3, sampling=sampling), adjustments=asked)
            for i in range(start, start + 250)
        ]
        for tokens in run(loop, batch).values():
            seen[tokens[0], tokens[1]] += 1
    assert chisquare(list(seen.values()), [count * p for p in exact.values()]).pvalue > 0.001


@pytest.mark.parametrize("asked", [LogitAdjustments(), CASES["all"]], ids=["plain", "adjusted"])
def test_logprobs_are_the_targets_own_of_every_token(asked: LogitAdjustments) -> None:
    expected = {name: naive(asked, prompt) for name, prompt in PROMPTS.items()}
    loop = make_loop(drafts=drafts_of(expected, 0.3))
    for one in asking(asked):
        loop.submit(dataclasses.replace(one, top_logprobs=3))
    told: dict[str, list[TokenLogprobs]] = {name: [] for name in PROMPTS}
    while loop.has_work:
        for output in loop.step():
            assert len(output.chunk.logprobs) == len(output.chunk.token_ids)
            told[output.request_id].extend(output.chunk.logprobs)
    decoder = tiny_decoder()
    for name, tokens in expected.items():
        laws = naive_logits(decoder, [*PROMPTS[name], *tokens])[-len(tokens) - 1 : -1].log_softmax(-1)
        for law, token_id, found in zip(laws, tokens, told[name], strict=True):
            assert found.logprob == pytest.approx(float(law[token_id]), abs=1e-4)
            likeliest = law.topk(3)
            assert [token for token, _ in found.top] == likeliest.indices.tolist()
            assert [value for _, value in found.top] == pytest.approx(likeliest.values.tolist(), abs=1e-4)


def test_logprobs_of_the_token_alone_and_none_unless_asked() -> None:
    loop = make_loop()
    loop.submit(dataclasses.replace(request("a", [1, 2, 3], 4), top_logprobs=0))
    loop.submit(request("b", [1, 2, 3], 4))
    while loop.has_work:
        for output in loop.step():
            wanted = len(output.chunk.token_ids) if output.request_id == "a" else 0
            assert [entry.top for entry in output.chunk.logprobs] == [()] * wanted


def test_what_was_counted_is_forgotten_with_its_sequence() -> None:
    loop = make_loop()
    run(loop, asking(CASES["all"]))
    loop.submit(asking(CASES["all"])[0])
    loop.step()
    loop.cancel("r0")
    assert loop._adjuster._outputs == {}


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"presence_penalty": 2.5}, "presence_penalty", r"in \[-2, 2\], got 2.5"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty", "got nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty", r"in \[0.01, 100\], got 0.0"),
        ({"logit_bias": ((3, 101.0),)}, "logit_bias", "got 101.0 for token 3"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias", "token id -1"),
        ({"logit_bias": ((3, 1.0), (3, 2.0))}, "logit_bias", "each token once"),
        ({"logit_bias": tuple((i, 1.0) for i in range(1025))}, "logit_bias", "1025 tokens"),
        ({"min_tokens": -1}, "min_tokens", "got -1"),
    ],
)
def test_impossible_adjustments_are_refused_by_field(fields: dict, field: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        LogitAdjustments(**fields)
    assert caught.value.field == field


def test_a_bias_beyond_the_vocabulary_is_refused() -> None:
    asked = dataclasses.replace(
        request("a", [1], 2), adjustments=LogitAdjustments(logit_bias=((VOCAB, 1.0),))
    )
    with pytest.raises(InvalidRequestError, match=f"got {VOCAB}") as caught:
        make_loop().submit(asked)
    assert caught.value.field == "logit_bias"


def test_stop_tokens_beyond_the_vocabulary_are_no_ones_problem() -> None:
    asked = dataclasses.replace(request("a", [1, 2], 4, stop=(VOCAB + 5,)), adjustments=CASES["min_tokens"])
    assert len(run(make_loop(), [asked])["a"]) == 4
