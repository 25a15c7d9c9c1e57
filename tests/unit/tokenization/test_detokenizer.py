"""Text from tokens piece by piece: the leading space is dropped once, and places count characters."""

from __future__ import annotations

from dspark_core.tokenization.detokenizer import IncrementalDetokenizer

PIECES = [b" a", b" b", b" c", "é".encode()[:1], "é".encode()[1:], b""]


def test_only_the_leading_space_of_the_whole_text_is_dropped() -> None:
    stripping = IncrementalDetokenizer(PIECES.__getitem__, strip_leading_space=True)
    assert [stripping.push([5]), stripping.push([0]), stripping.push([1, 2])] == ["", "a", " b c"]
    assert IncrementalDetokenizer(PIECES.__getitem__).push([0, 1]) == " a b"


def test_tokens_of_one_character_are_at_one_place_and_others_follow_it() -> None:
    detokenizer = IncrementalDetokenizer(PIECES.__getitem__, strip_leading_space=True)
    detokenizer.push([0, 1])
    assert detokenizer.place(3) == 3
    detokenizer.push([3])
    assert [detokenizer.place(token_id) for token_id in (4, 0, 5)] == [3, 4, 3]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.place(0) == 4
