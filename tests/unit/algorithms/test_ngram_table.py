"""An n-gram table finds the entries it was built from, the longest context first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.algorithms.lookup_evidence import LookupEvidence, prior_rates
from dspark_core.algorithms.ngram_table import (
    MAX_ORDER,
    NgramTable,
    build_slots,
    context_key,
    context_keys,
    levels_of,
)

EVIDENCE = LookupEvidence(prior_rates())
CONTEXTS = st.dictionaries(
    st.lists(st.integers(0, 200), min_size=1, max_size=4).map(tuple),
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 255)),
    min_size=1,
    max_size=200,
)


def table_of(
    entries: dict[tuple[int, ...], tuple[int, int]], order: int = 4, load: float = 0.8
) -> NgramTable:
    keys = np.array([context_key(context) for context in entries], dtype=np.uint64)
    tokens = np.array([token for token, _ in entries.values()], dtype=np.uint32)
    levels = np.array([level for _, level in entries.values()], dtype=np.uint8)
    return NgramTable(order, *build_slots(keys, tokens, levels, load), evidence=EVIDENCE)


@given(CONTEXTS, st.sampled_from([0.3, 0.8, 0.97]))
def test_every_entry_is_found_and_the_longest_context_decides(entries, load: float) -> None:
    table = table_of(entries, load=load)
    assert table.entries == len(entries)
    for context, said in entries.items():
        assert table.find(context) == said
        assert table.find((201, *context)) == said  # after a token that no context contains


def test_a_context_whose_hash_bits_are_all_zero_is_found_too() -> None:
    """Zero marks an empty slot, so such contexts, one in 65,536, share the check of others."""
    keys = context_keys(np.arange(200_000)[:, None])
    tokens = (keys & np.uint64(0xFFFF) == 0).nonzero()[0].tolist()
    assert tokens
    table = table_of({(token,): (7, 9) for token in tokens})
    assert [table.find([token]) for token in tokens] == [(7, 9)] * len(tokens)


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=3, max_size=3), min_size=1, max_size=20))
def test_keys_of_arrays_are_those_of_lists(contexts: list[list[int]]) -> None:
    assert context_keys(np.array(contexts)).tolist() == [context_key(context) for context in contexts]


def test_length_and_order_of_a_context_matter() -> None:
    keys = {context_key(context) for context in ((0,), (0, 0), (0, 0, 0), (1, 2), (2, 1), (1,), (2,))}
    assert len(keys) == 7


def test_what_was_never_said_is_hardly_ever_found() -> None:
    entries = {(a, b): (7, 9) for a in range(100) for b in range(100)}
    table = table_of(entries)
    strangers = sum(table.find((a, b)) is not None for a in range(200, 300) for b in range(200, 300))
    assert strangers <= 12  # 10,000 texts, two contexts each, 1 in 65,536 per slot probed


def test_unknown_and_empty_texts_find_nothing() -> None:
    table = table_of({(1, 2): (3, 200)})
    assert table.find([]) is None
    assert table.find([2]) is None
    assert table.find([9, 9, 9, 1, 2]) == (3, 200)


def test_levels_are_finer_where_tokens_are_sure() -> None:
    levels = levels_of(np.array([0.0, 0.1, 0.11, 0.99, 0.999, 1.0, 1.1])).tolist()
    assert levels[0] == 0
    assert levels[-2:] == [255, 255]
    assert levels[2] - levels[1] <= 2 < levels[4] - levels[3]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"order": 0}, "order"),
        ({"order": MAX_ORDER + 1}, "order"),
        ({"tokens": np.zeros(3, dtype=np.uint32)}, "of one length"),
        ({"checks": np.ones(4, dtype=np.uint16)}, "empty slot"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: dict[str, object], said: str) -> None:
    parts = {
        "order": 2,
        "checks": np.zeros(4, dtype=np.uint16),
        "tokens": np.zeros(4, dtype=np.uint32),
        "levels": np.zeros(4, dtype=np.uint8),
        "evidence": EVIDENCE,
    }
    with pytest.raises(ValueError, match=said):
        NgramTable(**{**parts, **change})
