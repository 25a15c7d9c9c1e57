"""Output with a grammar is as if masked token by token, however it is drafted and verified."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence

import llguidance
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from dspark_core.engine import grammars
from dspark_core.engine.drafts.lookup import LookupDrafting
from dspark_core.engine.grammars import GrammarCompiler, SequenceGrammar, SharedSpare, TokenizerDocument
from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.rounds.planning import FullPlanSource
from dspark_core.engine.rounds.verifier import Verifier
from dspark_core.errors import InvalidRequestError
from dspark_core.output_rules import Grammar, GrammarKind, LogitAdjustments
from dspark_core.records import FinishReason, GenerateRequest, SamplingParams, SpeculationOptions
from dspark_core.tokenization.grammar_sources import grammar_source
from tests.support.tiny_tokenizer import END, tiny_tokenizer
from tests.unit.engine.tiny import (
    VOCAB,
    ScriptedDrafts,
    make_loop,
    naive_greedy,
    naive_logits,
    prompts,
    request,
    run,
    tiny_decoder,
    tiny_engine,
)

TOKENS = 40
TOKENIZER = tiny_tokenizer()
COMPILER = GrammarCompiler(lambda: TokenizerDocument(TOKENIZER.to_str(), (END,)), VOCAB)
PROMPTS = {f"r{i}": prompt for i, prompt in enumerate(prompts(5, seed=31))}
SEEDED = SamplingParams(temperature=1.2, seed=9)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["abba", "true", "x"]}, "age": {"type": "integer", "maximum": 999}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GRAMMARS = {
    "regex": Grammar(kind=GrammarKind.REGEX, text="(ab|na){2,5}[0-9]+!"),
    "open": Grammar(kind=GrammarKind.REGEX, text="[a-c]{3,}"),
    "schema": Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(SCHEMA)),
    "lark": Grammar(kind=GrammarKind.LARK, text='start: pair pair?\npair: "x" /[0-9]/ | "[" pair "]"'),
    # Behind a thought, whose marks are text or tokens.
    "thought": Grammar(
        kind=GrammarKind.LARK,
        text='start: thought? answer\nthought: "a" ended GAP\nended[lazy]: TEXT "b"\nTEXT: /(.|\\n)*/\n'
        "GAP: /\\n{0,2}/\nanswer: %lark {\nstart: /(ab|na){2,5}[0-9]+!/\n}",
    ),
    "open thought": Grammar(
        kind=GrammarKind.LARK,
        text="start: thought answer\nthought: (TEXT other)* ended GAP\nended: TEXT <[58]>\nother: <[59]>\n"
        "TEXT: /(.|\\n)*/\nGAP: /\\n{0,2}/\n"
        f"answer: %lark {{\nstart: %json {json.dumps(SCHEMA)}\n}}",
    ),
    # For these, llguidance cannot roll tokens back.
    "stop": Grammar(kind=GrammarKind.LARK, text='start: t "!"\nt[stop="n"]: /[a-p]*/'),
    "max_tokens": Grammar(kind=GrammarKind.LARK, text='start: t "!"\nt[max_tokens=6]: /[a-z]*/'),
}


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar(kind=GrammarKind.JSON_SCHEMA, text='{"const": "a\\u0078!yb"}'),
        Grammar(kind=GrammarKind.REGEX, text='"ax\\!yb"'),
        Grammar(kind=GrammarKind.LARK, text=r'start: "\"ax!yb\""'),
        Grammar(kind=GrammarKind.LARK, text='start: %json {"const": "ax!yb"}'),
    ],
    ids=["schema", "regex", "lark", "schema in lark"],
)
def test_text_that_spells_an_added_token_is_written_by_other_tokens(grammar: Grammar) -> None:
    """Even where that text is forced, which a tokenizer would encode as the added token."""
    known = compiler_with_added("x!y").compile(asking(grammar)[0], grammar).result()
    for character in '"ax!yb"':
        (token_id,) = TOKENIZER.encode(character).ids
        assert known.allowed()[token_id]
        assert known.take((token_id,)) == 1
    assert known.complete


@pytest.mark.parametrize("text", ['start: "aab"', 'start: "a" <end> "aab"'])
def test_what_spells_no_added_token_is_still_forced(text: str) -> None:
    grammar = Grammar(kind=GrammarKind.LARK, text=text)
    assert compiler_with_added("x!y").compile(asking(grammar)[0], grammar).result().forced()


def compiler_with_added(text: str) -> GrammarCompiler:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([text])
    document = TokenizerDocument(tokenizer.to_str(), (END,))
    return GrammarCompiler(lambda: document, tokenizer.get_vocab_size())


def matcher(grammar: Grammar) -> llguidance.LLMatcher:
    tokens = llguidance.LLTokenizer(TOKENIZER.to_str(), n_vocab=VOCAB, eos_token=[END])
    return llguidance.LLMatcher(tokens, grammar_source(grammar), log_level=0)


def allowed(known: llguidance.LLMatcher, logits: Tensor) -> Tensor:
    """Masks the logits by what the matcher allows, checked token by token."""
    bits = known.compute_bitmask()
    keep = torch.tensor([bool(bits[token_id // 8] & (1 << token_id % 8)) for token_id in range(VOCAB)])
    assert all(known.validate_tokens([token_id]) for token_id in keep.nonzero()[:, 0].tolist())
    return logits.masked_fill(~keep, -1e9)


def naive(grammar: Grammar, prompt: Sequence[int]) -> list[int]:
    decoder, known, output = tiny_decoder(), matcher(grammar), list[int]()
    while len(output) < TOKENS and not known.is_stopped():
        logits = naive_logits(decoder, [*prompt, *output])[-1]
        output.append(int(allowed(known, logits).argmax()))
        assert known.consume_token(output[-1])
    return output


def asking(grammar: Grammar, **options: object) -> list[GenerateRequest]:
    return [
        dataclasses.replace(request(name, prompt, TOKENS, stop=(END,), **options), grammar=grammar)  # type: ignore[arg-type]
        for name, prompt in PROMPTS.items()
    ]


def loop_of(
    tokens: dict[str, list[int]], error_rate: float, *, apart: bool = False, lookup: bool = False
) -> RoundLoop:
    lengths = {name: len(prompt) for name, prompt in PROMPTS.items()}
    drafts = ScriptedDrafts(tokens, prompt_lengths=lengths, error_rate=error_rate, apart=apart)
    loop = make_loop(drafts=drafts)
    return RoundLoop(
        loop._engine,
        FullPlanSource(),
        drafting=loop._drafting,
        lookup=LookupDrafting() if lookup else None,
        cohorts=2 if apart else None,
        grammars=COMPILER,
        generator=torch.Generator().manual_seed(0),
    )


def text_of(tokens: Sequence[int]) -> str:
    return TOKENIZER.decode(list(tokens))


@pytest.mark.parametrize("grammar", GRAMMARS.values(), ids=GRAMMARS)
def test_greedy_output_is_the_masked_targets(grammar: Grammar) -> None:
    expected = {name: naive(grammar, prompt) for name, prompt in PROMPTS.items()}
    assert len({tuple(tokens) for tokens in expected.values()}) > 1
    for error_rate in (0.0, 0.4):
        assert run(loop_of(expected, error_rate), asking(grammar)) == expected
    assert run(loop_of(expected, 0.3, apart=True), asking(grammar)) == expected
    assert run(loop_of({}, 1.0, lookup=True), asking(grammar)) == expected


@pytest.mark.parametrize("sampling", [SEEDED, SamplingParams(temperature=1.5)])
def test_sampled_output_is_what_it_has_to_be(sampling: SamplingParams) -> None:
    for name, tokens in run(loop_of({}, 0.5), asking(GRAMMARS["schema"], sampling=sampling)).items():
        if len(tokens) < TOKENS:
            answer = json.loads(text_of(tokens))
            assert answer.keys() == {"name", "age"}, name
            assert answer["name"] in ("abba", "true", "x")
            assert answer["age"] <= 999
    for tokens in run(loop_of({}, 0.5), asking(GRAMMARS["regex"], sampling=sampling)).values():
        if len(tokens) < TOKENS:
            assert re.fullmatch(GRAMMARS["regex"].text, text_of(tokens))


@pytest.mark.parametrize("grammar", GRAMMARS.values(), ids=GRAMMARS)
def test_a_seed_still_makes_output_a_function_of_the_request(grammar: Grammar) -> None:
    plain = asking(grammar, sampling=SEEDED, speculation=SpeculationOptions(enabled=False))
    expected = {one.request_id: run(loop_of({}, 1.0), [one])[one.request_id] for one in plain}
    assert run(loop_of(expected, 0.3), asking(grammar, sampling=SEEDED)) == expected
    assert run(loop_of(expected, 0.3, apart=True), asking(grammar, sampling=SEEDED)) == expected


def test_another_verifier_goes_on_in_the_middle() -> None:
    whole = asking(GRAMMARS["schema"])[0]
    expected = run(loop_of({}, 1.0), [whole])[whole.request_id]
    for done in range(1, len(expected)):
        rest = dataclasses.replace(
            whole,
            prompt_token_ids=(*whole.prompt_token_ids, *expected[:done]),
            max_tokens=TOKENS - done,
            generated_tokens=done,
        )
        assert run(loop_of({}, 1.0), [rest])[whole.request_id] == expected[done:]


def test_output_that_cannot_have_been_generated_is_refused() -> None:
    whole = asking(GRAMMARS["schema"])[0]
    rest = dataclasses.replace(whole, prompt_token_ids=(*whole.prompt_token_ids, 3), generated_tokens=1)
    with pytest.raises(InvalidRequestError, match="token 3 of the output so far does not follow"):
        run(loop_of({}, 1.0), [rest])


def test_rejection_keeps_the_masked_distribution_though_most_drafts_may_not_stand() -> None:
    """How much is verified must not depend on which tokens were drafted. Chi-square, p > 0.001."""
    prompt, grammar = [5, 9, 2], Grammar(kind=GrammarKind.REGEX, text="[a-d][a-d][a-d]")
    decoder = tiny_decoder()

    def law(output: list[int]) -> dict[int, float]:
        known = matcher(grammar)
        known.consume_tokens(output)
        weights = allowed(known, naive_logits(decoder, [*prompt, *output])[-1]).double().softmax(-1)
        return {token_id: float(weight) for token_id, weight in enumerate(weights) if weight > 1e-12}

    exact = {(a, b): pa * pb for a, pa in law([]).items() for b, pb in law([a]).items()}
    count, seen = 3000, dict.fromkeys(exact, 0)
    loop = RoundLoop(
        tiny_engine(decoder, num_pages=400),
        FullPlanSource(),
        drafting=make_loop(drafts=ScriptedDrafts())._drafting,
        grammars=COMPILER,
        generator=torch.Generator().manual_seed(0),
    )
    loop._drafting._engine = loop._engine
    for start in range(0, count, 250):
        batch = [
            dataclasses.replace(
                request(f"q{i}", prompt, 3, sampling=SamplingParams(temperature=1.0)), grammar=grammar
            )
            for i in range(start, start + 250)
        ]
        for tokens in run(loop, batch).values():
            seen[tokens[0], tokens[1]] += 1
    likely = {pair: p for pair, p in exact.items() if count * p >= 5}
    rest = 1.0 - sum(likely.values())
    observed = [seen[pair] for pair in likely] + [count - sum(seen[pair] for pair in likely)]
    assert chisquare(observed, [count * p for p in likely.values()] + [count * rest]).pvalue > 0.001


def test_what_a_grammar_leaves_no_choice_of_is_drafted_for_nothing() -> None:
    schema = {
        "type": "object",
        "properties": {"a_long_name_that_nobody_has_to_guess": {"enum": [1, 2]}},
        "required": ["a_long_name_that_nobody_has_to_guess"],
        "additionalProperties": False,
    }
    (asked, *_) = asking(Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema)))
    loop = RoundLoop(
        tiny_engine(),
        FullPlanSource(),
        lookup=LookupDrafting(),
        grammars=COMPILER,
        generator=torch.Generator().manual_seed(0),
    )
    loop.submit(dataclasses.replace(asked, max_tokens=80))
    chunks = []
    while loop.has_work:
        chunks += [output.chunk for output in loop.step()]
    assert chunks[-1].finish_reason is FinishReason.STOP  # once complete, without a stop token
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    assert json.loads(text_of(tokens)).keys() == set(schema["required"])
    stats = chunks[-1].stats
    assert stats is not None
    assert stats.lookup_accepted_tokens >= 20
    assert stats.rounds < len(tokens) / 2


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar(kind=GrammarKind.REGEX, text="[ab"), "invalid regex"),
        (
            Grammar(kind=GrammarKind.JSON_SCHEMA, text='{"type": "string", "pattern": "^(?!x).*$"}'),
            r"regex parse error: .*\(\?!x\).*look-around.* is not supported",
        ),
        (Grammar(kind=GrammarKind.JSON_SCHEMA, text='{"type": "objekt"}'), "objekt"),
        (Grammar(kind=GrammarKind.JSON_SCHEMA, text='{"type"'), "no JSON"),
        (Grammar(kind=GrammarKind.LARK, text="start: nobody"), "unknown name"),
    ],
)
def test_what_is_no_grammar_is_refused(grammar: Grammar, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        loop_of({}, 1.0).submit(asking(grammar)[0])
    assert caught.value.field == "grammar"
    assert "\n" not in str(caught.value)


def test_a_loop_without_a_tokenizer_refuses_grammars() -> None:
    with pytest.raises(InvalidRequestError, match="there is none for this model"):
        make_loop().submit(asking(GRAMMARS["regex"])[0])


def test_a_tokenizer_that_cannot_be_used_is_told_of_and_asked_once() -> None:
    compiler = GrammarCompiler(lambda: TokenizerDocument("{}", (END,)), VOCAB)
    with pytest.raises(InvalidRequestError, match="not for this model's tokenizer"):
        compiler.compile(asking(GRAMMARS["regex"])[0], GRAMMARS["regex"]).result()


def test_empty_and_endless_grammars_are_refused() -> None:
    for text in ("", "  ", "x" * 70_000):
        with pytest.raises(InvalidRequestError) as caught:
            Grammar(kind=GrammarKind.REGEX, text=text)
        assert caught.value.field == "grammar"


def test_what_is_tried_changes_nothing() -> None:
    grammar = COMPILER.compile(asking(GRAMMARS["regex"])[0], GRAMMARS["regex"]).result()
    assert isinstance(grammar, SequenceGrammar)
    before = grammar.allowed()
    ids = TOKENIZER.encode("abna").ids
    assert grammar.valid(ids) == grammar.ahead().take(ids) == len(ids)
    assert (grammar.allowed() == before).all()
    assert not grammar.complete
    assert grammar.problem is None


GROWING = {
    "anyOf": [
        {
            "type": "object",
            "properties": {
                f"p{i}_{j}": {"type": "string", "pattern": f"^[a-z]*{j}[a-z]*$"} for j in range(20)
            },
        }
        for i in range(40)
    ]
}
"""Valid, but exceeds llguidance's limits once the object is open."""


@pytest.mark.parametrize("error_rate", [0.0, 1.0])
def test_a_grammar_that_cannot_be_followed_fails_its_own_request_alone(error_rate: float) -> None:
    grammar = Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(GROWING))
    (doomed, *_), (_, *others) = asking(grammar), asking(GRAMMARS["regex"])
    expected = {one.request_id: naive(GRAMMARS["regex"], one.prompt_token_ids) for one in others}
    loop = loop_of(expected | {doomed.request_id: [0, 4, 19, 9]}, error_rate)
    for one in (doomed, *others):
        loop.submit(one)
    tokens: dict[str, list[int]] = {one.request_id: [] for one in (doomed, *others)}
    errors = []
    while loop.has_work:
        for output in loop.step():
            tokens[output.request_id].extend(output.chunk.token_ids)
            if output.error is not None:
                errors.append((output.request_id, output.error))
    ((name, error),) = errors
    assert name == doomed.request_id
    assert isinstance(error, InvalidRequestError)
    assert "items" in str(error)
    assert {one.request_id: tokens[one.request_id] for one in others} == expected
    assert loop.free_kv_fraction == 1.0


@pytest.mark.parametrize("error_rate", [0.0, 1.0])
def test_a_grammar_that_takes_too_long_fails_its_own_request_alone(monkeypatch, error_rate: float) -> None:
    slow, other = asking(GRAMMARS["open"])[0], dataclasses.replace(asking(GRAMMARS["open"])[1], grammar=None)
    expected = naive_greedy(tiny_decoder(), other.prompt_token_ids, other.max_tokens)
    monkeypatch.setattr(grammars, "CALL_SECONDS", -0.2)  # as if each call took that much longer
    monkeypatch.setattr(COMPILER, "_spare", SharedSpare())
    loop = loop_of({other.request_id: expected}, error_rate)
    loop.submit(slow)
    loop.submit(other)
    tokens: list[int] = []
    errors = []
    while loop.has_work:
        for output in loop.step():
            if output.request_id == other.request_id:
                tokens.extend(output.chunk.token_ids)
            elif output.error is not None:
                errors.append(str(output.error))
    assert errors == ["grammar: too complex: finding the tokens that may follow takes too long"]
    assert tokens == expected
    assert loop.free_kv_fraction == 1.0


async def test_its_caller_hears_why() -> None:
    verifier = Verifier(loop_of({}, 1.0))
    verifier.start()
    try:
        asked = asking(Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(GROWING)))[0]
        with pytest.raises(InvalidRequestError, match=r"grammar: .*items"):
            async for _ in verifier.generate(asked):
                pass
        chunks = [chunk async for chunk in verifier.generate(asking(GRAMMARS["regex"])[1])]
        assert chunks[-1].finish_reason is not None
    finally:
        verifier.stop()


NO_ANSWER = "start: start"


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar(kind=GrammarKind.JSON_SCHEMA, text='{"$ref": "#"}'),
        Grammar(kind=GrammarKind.LARK, text=NO_ANSWER),
        Grammar(kind=GrammarKind.REGEX, text=r"[^\s\S]"),
    ],
)
def test_a_grammar_without_answers_is_refused_in_words(grammar: Grammar) -> None:
    with pytest.raises(InvalidRequestError, match=r"^grammar: matches no text that this model can write$"):
        COMPILER.compile(asking(grammar)[0], grammar).result()


def test_nor_does_anything_follow_a_thought_without_answers() -> None:
    text = f'start: "a" answer\nanswer: %lark {{\n{NO_ANSWER}\n}}'
    grammar = Grammar(kind=GrammarKind.LARK, text=text)
    known = COMPILER.compile(asking(grammar)[0], grammar).result()
    assert known.take(TOKENIZER.encode("a").ids) == 1
    known.allowed()
    assert known.problem == "matches no text that this model can write"


def test_a_complete_answer_ends_whatever_min_tokens_says() -> None:
    asked = dataclasses.replace(
        asking(Grammar(kind=GrammarKind.LARK, text='start: "a" <end>'))[0],
        adjustments=LogitAdjustments(min_tokens=6),
    )
    assert run(loop_of({}, 1.0), [asked])[asked.request_id] == [*TOKENIZER.encode("a").ids, END]


@pytest.mark.parametrize("error_rate", [0.0, 1.0])
@pytest.mark.parametrize(("stop", "least", "expected"), [((), 0, TOKENS), ((), 25, TOKENS), ((END,), 25, 25)])
def test_an_open_grammar_goes_on_while_it_has_to(
    stop: tuple[int, ...], least: int, expected: int, error_rate: float
) -> None:
    """Continues past the model's own end token if that is no stop (`ignore_eos`), and up to `min_tokens`."""
    for asked in asking(GRAMMARS["open"], sampling=SEEDED):
        going_on = dataclasses.replace(
            asked, stop_token_ids=stop, adjustments=LogitAdjustments(min_tokens=least)
        )
        output = run(loop_of({}, 0.0), [going_on])[asked.request_id]
        assert len(output) >= expected
        assert END not in output[:expected]
        drafted = run(loop_of({asked.request_id: output}, error_rate), [going_on])
        assert drafted[asked.request_id] == output


def test_stops_that_alone_may_follow_are_drawn_as_the_target_likes_them() -> None:
    digits = tuple(TOKENIZER.encode(digit).ids[0] for digit in "0123456789")
    grammar = Grammar(kind=GrammarKind.REGEX, text="x[0-9]")
    for asked in asking(grammar):
        plain = dataclasses.replace(asked, stop_token_ids=(*digits, END))
        wanted = run(loop_of({}, 1.0), [plain])[asked.request_id]
        for least in (1, 2, 9):  # reached before the stop, with the stop, or never
            longer = dataclasses.replace(plain, adjustments=LogitAdjustments(min_tokens=least))
            assert run(loop_of({}, 1.0), [longer])[asked.request_id] == wanted


def test_logprobs_of_masked_tokens_are_the_targets_own() -> None:
    asked = dataclasses.replace(asking(GRAMMARS["regex"])[0], top_logprobs=2)
    loop = loop_of({}, 1.0)
    loop.submit(asked)
    told, tokens = [], []
    while loop.has_work:
        for output in loop.step():
            told += output.chunk.logprobs
            tokens += output.chunk.token_ids
    laws = naive_logits(tiny_decoder(), [*asked.prompt_token_ids, *tokens])[
        -len(tokens) - 1 : -1
    ].log_softmax(-1)
    for law, token_id, found in zip(laws, tokens, told, strict=True):
        assert found.logprob == pytest.approx(float(law[token_id]), abs=1e-4)
        assert [token for token, _ in found.top] == law.topk(2).indices.tolist()


def test_a_tokenizer_that_cannot_be_prepared_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    GrammarCompiler(lambda: TokenizerDocument("{}", (END,)), VOCAB).prepare()
    assert "requests with a grammar will be refused" in caplog.text
