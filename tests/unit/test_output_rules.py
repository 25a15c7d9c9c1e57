"""The bounds of what a request may ask of its output are inclusive, whoever makes the request."""

from __future__ import annotations

import pytest

from dspark_core.errors import InvalidRequestError
from dspark_core.output_rules import (
    LEAST_PENALTY,
    MAX_BIASED_TOKENS,
    MAX_GRAMMAR_CHARACTERS,
    Grammar,
    GrammarKind,
    LogitAdjustments,
)


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": tuple((token_id, -100.0) for token_id in range(MAX_BIASED_TOKENS))},
        {"logit_bias": ((0, 100.0),)},
        {"repetition_penalty": LEAST_PENALTY},
        {"repetition_penalty": 100.0},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0},
        {"presence_penalty": 2.0, "frequency_penalty": -2.0},
    ],
)
def test_adjustments_may_be_as_strong_as_stated(fields: dict) -> None:
    LogitAdjustments(**fields)


@pytest.mark.parametrize("penalty", [LEAST_PENALTY / 2, 100.5])
def test_repetition_penalties_that_could_revive_a_banned_token_are_refused(penalty: float) -> None:
    with pytest.raises(InvalidRequestError, match="repetition_penalty"):
        LogitAdjustments(repetition_penalty=penalty)


def test_grammars_may_be_as_long_as_stated() -> None:
    Grammar(kind=GrammarKind.REGEX, text="a" * MAX_GRAMMAR_CHARACTERS)
    for text in ("a" * (MAX_GRAMMAR_CHARACTERS + 1), " \n"):
        with pytest.raises(InvalidRequestError, match="grammar"):
            Grammar(kind=GrammarKind.REGEX, text=text)
