"""Finds where the end of a text occurred before in it, and what followed there.

Prompt lookup (Saxena, 2023; "LLMA", arXiv 2304.04487): answers repeat their prompt and themselves, and
what followed the last time is a draft that costs no model pass. Values only, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_MATCH = 16
"""Longer matches are not told apart."""
REMEMBERED = 8
"""Latest places kept of each pair of tokens: the longest match among them is taken."""


@dataclass(frozen=True, slots=True)
class SuffixMatch:
    """`token_ids` followed the last time the text's final `length` tokens occurred."""

    length: int
    token_ids: tuple[int, ...]


class SuffixIndex:
    """Places of every token and every pair of tokens in one growing text."""

    def __init__(self) -> None:
        self._singles: dict[int, int] = {}
        self._pairs: dict[tuple[int, int], list[int]] = {}
        self._indexed = 1
        """Ends below this are known: an end is the place of the token that follows."""

    def longest(self, tokens: Sequence[int], most: int) -> SuffixMatch | None:
        """The longest match of the end of `tokens`, the latest of equals, and at most `most` tokens
        after it. `tokens` must begin with what it was in the last call. None: the last token is new.

        A match may overlap the end; what follows it then repeats with the distance between the two.
        """
        self._index(tokens)
        if most < 1 or not tokens:
            return None
        end, length = self._best(tokens)
        if end is None:
            return None
        period = len(tokens) - end
        following = tokens[end : end + min(most, period)]
        repeats = -(-most // len(following))
        return SuffixMatch(length, (tuple(following) * repeats)[:most])

    def _index(self, tokens: Sequence[int]) -> None:
        """Everything before the final token: where the text ends is no earlier place."""
        for end in range(self._indexed, len(tokens)):
            self._singles[tokens[end - 1]] = end
            if end > 1:
                places = self._pairs.setdefault((tokens[end - 2], tokens[end - 1]), [])
                places.append(end)
                if len(places) > REMEMBERED:
                    del places[0]
        self._indexed = max(self._indexed, len(tokens))

    def _best(self, tokens: Sequence[int]) -> tuple[int | None, int]:
        """Where the longest match ends, and its length."""
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
    """How many tokens before `end` equal the final ones, of at most `MAX_MATCH`."""
    last, common = len(tokens), 0
    most = min(MAX_MATCH, end)
    while common < most and tokens[end - 1 - common] == tokens[last - 1 - common]:
        common += 1
    return common
