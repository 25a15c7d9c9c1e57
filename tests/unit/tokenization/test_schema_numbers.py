"""Numbers in the schemas of grammars: an answer has exactly the number demanded, or one within its bounds."""

from __future__ import annotations

import json
import operator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from dspark_core.output_rules import Grammar, GrammarKind
from dspark_core.tokenization.grammar_sources import grammar_source, problem_of
from dspark_core.tokenization.schema_numbers import exact_numbers
from tests.support.byte_tokenizer import END, byte_tokenizer

MODEL = byte_tokenizer()
TOKENS = LLTokenizer(MODEL.document, n_vocab=MODEL.vocab_size, eos_token=[END])
EDGES = [sign * edge for edge in (2**53, 10**18, 2**60, 2**63, 2**64, 10**19) for sign in (1, -1)]
ODD = 9007199254740993
"""No double."""
COMPARED = {
    "minimum": operator.ge,
    "exclusiveMinimum": operator.gt,
    "maximum": operator.le,
    "exclusiveMaximum": operator.lt,
}


def grammar_of(schema: object) -> Grammar:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=text)


def lark(text: str) -> Grammar:
    return Grammar(kind=GrammarKind.LARK, text=text)


def accepts(grammar: Grammar, text: str) -> bool:
    matcher = LLMatcher(TOKENS, grammar_source(grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    token_ids = list(MODEL.encode(text, add_special_tokens=False))
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


near_edges = st.builds(operator.add, st.sampled_from(EDGES), st.integers(-1500, 1500))


@given(
    st.sampled_from(["integer", "number", None]), st.dictionaries(st.sampled_from([*COMPARED]), near_edges)
)
@example("integer", {"minimum": 1234567890123456700, "maximum": 1234567890123457700})
@example("number", {"maximum": 2**60})
@example("integer", {"exclusiveMinimum": 2**53})
@example("integer", {"minimum": -(2**63), "maximum": 2**63 - 1})
@example("number", {"minimum": -(2**63), "exclusiveMaximum": 2**64})
@settings(deadline=None)
def test_answers_are_within_their_bounds(kind: str | None, bounds: dict[str, int]) -> None:
    grammar = grammar_of({**bounds, **({"type": kind} if kind else {})})
    if problem_of(grammar) is not None:
        return
    numbers = {
        edge + offset for edge in bounds.values() for offset in (-1025, -257, -2, -1, 0, 1, 2, 257, 1025)
    }
    for number in numbers:
        if accepts(grammar, str(number)):
            assert all(COMPARED[name](number, bound) for name, bound in bounds.items()), number


@given(near_edges)
@example(ODD)
@example(2**63 - 1)
@example(-(2**63))
@example(1 - 2**63)
@settings(deadline=None)
def test_a_demanded_integer_is_written_exactly_or_refused(number: int) -> None:
    for schema in ({"const": number}, {"enum": [[{"a": number}]]}, {"type": "integer", "const": number}):
        grammar = grammar_of(schema)
        problem = problem_of(grammar)
        held = abs(number) < 2**63 and (float(number) == number or number == 2**63 - 1)
        if held:
            assert problem is None
            assert accepts(grammar, json.dumps(schema.get("const", schema.get("enum", [None])[0])))
        else:
            assert problem.startswith(f"{[*schema][-1]} cannot demand {number}: ")


@pytest.mark.parametrize("kind", ["integer", "number"])
@pytest.mark.parametrize(
    "bounds", [(-(2**63), 2**63 - 1), (0, 2**64 - 1), (-(2**63), 2**63), (-3.4e38, 3.4e38)]
)
def test_the_bounds_of_machine_numbers_can_be_demanded(kind: str, bounds: tuple[float, float]) -> None:
    grammar = grammar_of({"type": kind, "minimum": bounds[0], "maximum": bounds[1]})
    assert problem_of(grammar) is None
    assert accepts(grammar, "0")
    assert accepts(grammar, str(10**18))
    assert accepts(grammar, "-1") == (bounds[0] < 0)


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"minimum": 1e19}, "minimum 1e+19 cannot be demanded: "),
        ({"exclusiveMaximum": -(2**64)}, "exclusiveMaximum -18446744073709551616 cannot be demanded: "),
        ({"minimum": ODD, "maximum": ODD}, f"minimum {ODD} and maximum {ODD} leave no number that a double"),
        ({"enum": ["x", {"const": [2**64 - 1]}]}, "enum cannot demand 18446744073709551615: "),
        ({"items": {"anyOf": [{"const": ODD}]}}, f"const cannot demand {ODD}: "),
        ('{"minimum": NaN}', "the schema is no JSON: it has the number NaN"),
        ('{"maximum": 1e999}', "the schema is no JSON: it has the number 1e999"),
        ('{"const": "\\ud800"}', "the schema is no JSON: "),
    ],
)
def test_what_cannot_be_demanded_is_refused_by_name_and_value(schema: object, told: str) -> None:
    for grammar in (grammar_of(schema), lark(f'start: "%json" %json\n{grammar_of(schema).text} // %json {{')):
        assert problem_of(grammar).startswith(told)


def test_other_schemas_stay_as_they_are() -> None:
    schema = {
        "type": "object",
        "properties": {
            "const": {"type": "integer", "minimum": 1, "exclusiveMaximum": 2**53 - 1, "default": 10**30},
            "enum": {"enum": [1, 0.1, 2**60, "x", None, True]},
            "minimum": {"minimum": "x", "exclusiveMinimum": True},
        },
        "examples": [{"const": ODD}],
    }
    assert exact_numbers(schema) == schema


def test_schemas_within_other_grammars_are_kept_to_what_is_held() -> None:
    grammar = lark(
        'start: "%json {" /["]%json/ a | b # %json "\na: %json {"maximum": 18446744073709551615}\n'
        'b: %json{"const": 1}'
    )
    assert accepts(grammar, '%json {"%json12')
    assert accepts(grammar, "1")
