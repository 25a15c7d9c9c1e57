"""Grammars are checked in a process that may be ended, so that none of them holds up the others."""

import json

import pytest

from dspark_core.errors import InvalidRequestError, QueueFullError
from dspark_core.output_rules import Grammar, GrammarKind
from dspark_core.tokenization.grammar_checking import WAIT_SECONDS, GrammarChecker
from tests.support.clock import ManualClock

ENDLESS = json.dumps(
    {"allOf": [{"type": "string", "pattern": f".*{letter}.*"} for letter in "abcdefghijklmnopqrstuvwx"]}
)
"""Minutes at least, for an answer of no."""


def schema(text: str) -> Grammar:
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=text)


def problem(checker: GrammarChecker, grammar: Grammar) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        checker.check(grammar, "response_format").result(timeout=60)
    assert caught.value.field == "response_format"
    return str(caught.value)


def test_a_grammar_that_is_none_is_told_in_the_words_of_its_field() -> None:
    checker = GrammarChecker()
    assert problem(checker, schema("{")).startswith("response_format: the schema is no JSON: ")
    wrong = Grammar(kind=GrammarKind.REGEX, text="(👻")
    assert problem(checker, wrong).startswith("response_format: ")
    checker.check(Grammar(kind=GrammarKind.REGEX, text="👻|\u2028"), "regex").result(timeout=60)


def test_a_grammar_that_takes_for_ever_is_refused_and_others_are_not() -> None:
    checker = GrammarChecker(check_seconds=0.3)
    endless = checker.check(schema(ENDLESS), "tools")
    after = checker.check(schema('{"type": "object"}'), "tools")
    with pytest.raises(InvalidRequestError, match=r"tools: too complex: .* more than 0\.3 s"):
        endless.result(timeout=60)
    after.result(timeout=60)


def test_ordinary_grammars_do_not_wait_for_hopeless_ones() -> None:
    checker = GrammarChecker()
    hopeless = [checker.check(schema(ENDLESS), "tools") for _ in range(4)]
    checker.check(schema('{"type": "object"}'), "tools").result(timeout=60)
    assert not hopeless[-1].done()
    for one in hopeless:
        with pytest.raises(
            (InvalidRequestError, QueueFullError)
        ):  # a busy machine takes long for all of them
            one.result(timeout=120)


def test_a_grammar_whose_turn_comes_too_late_is_refused_by_its_field() -> None:
    clock = ManualClock()
    checker = GrammarChecker(clock=clock)
    first = checker.check(schema(ENDLESS), "tools")
    late = checker.check(schema('{"type": "object"}'), "response_format")
    clock.advance(WAIT_SECONDS + 1)
    with pytest.raises(QueueFullError, match=r"^response_format: more grammars are being checked than 10 s"):
        late.result(timeout=60)
    with pytest.raises((InvalidRequestError, QueueFullError)):
        first.result(timeout=60)
    checker.check(schema('{"type": "object"}'), "response_format").result(timeout=60)


def test_a_check_may_be_cancelled_until_it_begins() -> None:
    checker = GrammarChecker()
    begun = checker.check(schema(ENDLESS), "tools")
    waiting = checker.check(schema('{"type": "object"}'), "tools")
    assert waiting.cancel()
    with pytest.raises(InvalidRequestError):
        begun.result(timeout=60)
