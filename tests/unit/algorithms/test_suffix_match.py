"""Looking up the end of a text in the text itself agrees with an exhaustive search."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.algorithms.suffix_match import MAX_MATCH, REMEMBERED, SuffixIndex

TEXTS = st.lists(st.integers(0, 2), min_size=1, max_size=40)


def agreement(text: list[int], end: int) -> int:
    """How many tokens before `end` equal the text's last tokens."""
    count = 0
    while count < min(MAX_MATCH, end) and text[end - 1 - count] == text[-1 - count]:
        count += 1
    return count


@given(TEXTS, st.integers(1, 9))
def test_no_place_among_the_latest_agrees_longer(text: list[int], most: int) -> None:
    match = SuffixIndex().longest(text, most)
    pair = text[-2:]
    ends = [end for end in range(1, len(text)) if text[max(end - 2, 0) : end] == pair]
    if len(pair) < 2 or not ends:
        ends = [end for end in range(1, len(text)) if text[end - 1] == text[-1]][-1:]
    if not ends:
        assert match is None
        return
    assert match is not None
    assert match.length == max(agreement(text, end) for end in ends[-REMEMBERED:])


@given(TEXTS, st.integers(1, 9))
def test_what_follows_continues_a_place_that_agrees(text: list[int], most: int) -> None:
    match = SuffixIndex().longest(text, most)
    if match is None:
        return
    assert len(match.token_ids) == most

    def follows(end: int) -> list[int]:
        copied = list(text)
        for _ in range(most):
            copied.append(copied[end + len(copied) - len(text)])
        return copied[len(text) :]

    ends = [end for end in range(1, len(text)) if agreement(text, end) >= match.length]
    assert list(match.token_ids) in [follows(end) for end in ends]


@given(TEXTS, st.data())
def test_a_growing_text_is_looked_up_like_a_new_one(text: list[int], data: st.DataObject) -> None:
    index = SuffixIndex()
    cuts = data.draw(st.lists(st.integers(1, len(text)), max_size=5))
    for cut in sorted(cuts):
        index.longest(text[:cut], 3)
    assert index.longest(text, 5) == SuffixIndex().longest(text, 5)


def test_of_equal_matches_the_latest_is_taken() -> None:
    match = SuffixIndex().longest([1, 2, 7, 0, 1, 2, 8, 0, 1, 2], 1)
    assert match is not None
    assert match.token_ids == (8,)


def test_a_longer_match_beats_a_later_one() -> None:
    match = SuffixIndex().longest([5, 1, 2, 7, 0, 1, 2, 8, 5, 1, 2], 1)
    assert match is not None
    assert (match.length, match.token_ids) == (3, (7,))


def test_a_loop_goes_on_past_the_end() -> None:
    match = SuffixIndex().longest([9, 1, 2, 1, 2], 6)
    assert match is not None
    assert match.token_ids == (1, 2, 1, 2, 1, 2)


@pytest.mark.parametrize("text", [[], [4], [1, 2, 3]])
def test_nothing_is_found_where_the_last_token_is_new(text: list[int]) -> None:
    assert SuffixIndex().longest(text, 4) is None
