"""Finds earlier occurrences of the end of a text within it, and what followed there.

Prompt lookup (Saxena, 2023; "LLMA", arXiv 2304.04487): answers repeat their prompt and themselves, so
what followed last time is a draft that costs no model pass. Values only, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_MATCH = 16
"""Longer matches are not distinguished."""
REMEMBERED = 8
"""Latest positions kept per token pair; the longest match among them is used."""


@dataclass(frozen=True, slots=True)
class SuffixMatch:
    """`token_ids` followed the matched occurrence of the text's final `length` tokens."""

    length: int
    token_ids: tuple[int, ...]


class SuffixIndex:
    """Positions of every token and token pair in one growing text."""

    def __init__(self) -> None:
        self._singles: dict[int, int] = {}
        self._pairs: dict[tuple[int, int], list[int]] = {}
        self._indexed = 1
        """Ends below this are indexed; an end is the position of the token that follows."""

    def longest(self, tokens: Sequence[int], most: int) -> SuffixMatch | None:
        """The longest match of the end of `tokens`, the latest on ties, with up to `most` tokens after it.
        `tokens` must extend those of the previous call. None: the last token is new.

        A match may overlap the end; its continuation then repeats with the period of the overlap.
        """
        self._index(tokens)
        if most < 1 or not tokens:
            return None
        end, length = self._best(tokens)
        if end is None:
            return None
        following = tokens[end : end + most]
        repeats = -(-most // len(following))
        return SuffixMatch(length, (tuple(following) * repeats)[:most])

    def _index(self, tokens: Sequence[int]) -> None:
        """Indexes all but the final token: the end of the text is not an earlier occurrence."""
        for end in range(self._indexed, len(tokens)):
            self._singles[tokens[end - 1]] = end
            if end > 1:
                places = self._pairs.setdefault((tokens[end - 2], tokens[end - 1]), [])
                places.append(end)
                if len(places) > REMEMBERED:
                    del places[0]
        self._indexed = max(self._indexed, len(tokens))

    def _best(self, tokens: Sequence[int]) -> tuple[int | None, int]:
        """End position of the longest match, and its length."""
        places = self._pairs.get((tokens[-2], tokens[-1])) if len(tokens) > 1 else None
        if places is None:
            return self._singles.get(tokens[-1]), 1
        best, length = places[-1], 0
        for end in reversed(places):
            common = _common_suffix(tokens, end)
            if common > length:
                best, length = end, common
        return best, length


def _common_suffix(tokens: Sequence[int], end: int) -> int:
    """Number of tokens before `end` that equal the final ones, at most `MAX_MATCH`."""
    last, common = len(tokens), 0
    most = min(MAX_MATCH, end)
    while common < most and tokens[end - 1 - common] == tokens[last - 1 - common]:
        common += 1
    return common
