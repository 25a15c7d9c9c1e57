"""Grammars are checked in a process that may be ended, so that none of them holds up the others."""

import json

import pytest

from dspark_core.errors import InvalidRequestError
from dspark_core.output_rules import Grammar, GrammarKind
from dspark_core.tokenization.grammar_checking import GrammarChecker

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
