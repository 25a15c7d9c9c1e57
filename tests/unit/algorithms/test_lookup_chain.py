"""Blocks from a match in the text and a table: which source is trusted, and where a block ends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dspark_core.algorithms.lookup_chain import LEAST_SURVIVAL, lookup_chain
from dspark_core.algorithms.lookup_evidence import (
    CLASS_SHAPE,
    PRIOR_RATES,
    LookupEvidence,
    Support,
    measured_rates,
    prior_rates,
)
from dspark_core.algorithms.ngram_table import NgramTable, empty_table
from dspark_core.algorithms.suffix_match import SuffixMatch
from tests.unit.algorithms.test_ngram_table import table_of

SURE, WEAK = 250, 60


def with_rates(given: NgramTable, **rates: float) -> NgramTable:
    changed = np.full(CLASS_SHAPE, 0.5, dtype=np.float32)
    for name, rate in rates.items():
        changed[Support[name.upper()]] = rate
    return replace(given, evidence=LookupEvidence(changed))


def test_without_a_match_the_table_goes_on_from_its_own_tokens() -> None:
    table = table_of({(1,): (2, SURE), (1, 2): (3, SURE), (2, 3): (1, SURE)})
    tokens, confidences = lookup_chain(table, [1], None, 5)
    assert tokens == (2, 3, 1, 2, 3)
    assert all(0.9 < c < 1.0 for c in confidences)


def test_a_match_goes_on_where_the_table_knows_nothing() -> None:
    match = SuffixMatch(2, (3, 4))
    tokens, confidences = lookup_chain(table_of({(8,): (9, SURE)}), [5, 6], match, 9)
    assert tokens == (3, 4)
    assert confidences == pytest.approx(PRIOR_RATES[1:3])
    assert lookup_chain(empty_table(), [5, 6], match, 9) == (tokens, confidences)


def test_who_is_likelier_is_believed_and_what_followed_a_refuted_match_is_forgotten() -> None:
    table = table_of({(6,): (7, SURE), (7,): (8, SURE)})
    match = SuffixMatch(1, (3, 4, 5))
    of_table, _ = lookup_chain(with_rates(table, table=0.8, match=0.3), [6], match, 2)
    of_match, sure = lookup_chain(with_rates(table, table=0.3, match=0.8), [6], match, 2)
    assert of_table == (7, 8)
    assert of_match == (3, 4)
    assert sure == pytest.approx((0.8, 0.8))


def test_where_both_agree_both_count() -> None:
    table = with_rates(table_of({(6,): (3, SURE)}), both=0.95, table=0.5, match=0.5)
    tokens, confidences = lookup_chain(table, [6], SuffixMatch(4, (3,)), 3)
    assert tokens == (3,)
    assert confidences == pytest.approx((0.95,))


def test_a_block_ends_before_what_hardly_survives() -> None:
    table = with_rates(table_of({(1,): (1, SURE)}), table=0.1)
    tokens, confidences = lookup_chain(table, [1], None, 15)
    assert 0.1 ** (len(tokens) + 1) < LEAST_SURVIVAL <= 0.1 ** len(tokens)
    assert len(tokens) == len(confidences) == 1


def test_nothing_is_drafted_from_nothing() -> None:
    table = table_of({(1,): (1, SURE)})
    assert lookup_chain(table, [2], None, 5) == ((), ())
    assert lookup_chain(table, [1], SuffixMatch(3, (1, 1)), 0) == ((), ())


def test_supposed_rates_rise_with_what_speaks_for_a_token() -> None:
    rates = prior_rates()
    assert (np.diff(rates[Support.BOTH, 1:, :-1], axis=0) >= 0.0).all()
    assert (np.diff(rates[Support.TABLE, 0, :-1]) >= 0.0).all()
    assert (rates[Support.BOTH, 1:, :-1] >= rates[Support.MATCH, 1:, :-1]).all()
    # The table is not trusted against a long match that says otherwise.
    assert rates[Support.TABLE, -1, :-1].max() < 0.05 < 0.9 < rates[Support.MATCH, -1, :-1].min()


def test_measured_rates_follow_what_stood_and_fall_back_where_little_was_judged() -> None:
    stood, judged = np.zeros(CLASS_SHAPE), np.zeros(CLASS_SHAPE)
    stood[Support.TABLE, 0, 3], judged[Support.TABLE, 0, 3] = 700.0, 1000.0
    rates = measured_rates(stood, judged)
    assert rates[Support.TABLE, 0, 3] == pytest.approx(0.7, abs=0.01)
    assert rates[Support.TABLE, 0, 4] == prior_rates()[Support.TABLE, 0, 4]


@pytest.mark.parametrize(
    "wrong", [np.zeros(CLASS_SHAPE, dtype=np.float32), prior_rates()[:2], prior_rates() * 2]
)
def test_rates_that_are_none_are_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="rates must"):
        LookupEvidence(wrong)
