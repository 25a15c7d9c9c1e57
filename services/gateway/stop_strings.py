"""Finds stop strings in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text through up to the first stop string, wherever the pieces are cut.

    Text that may be the beginning of a stop string is held back until that is decided. Matching is
    Knuth-Morris-Pratt, so the amortised cost per character does not depend on the strings' lengths.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """stops: must not be empty strings."""
        self._matchers = [_Matcher(stop) for stop in stops]
        self._held = ""
        self._matched = False

    @property
    def matched(self) -> bool:
        """Whether a stop string has been seen; it and all text after it are dropped."""
        return self._matched

    def push(self, text: str, *, early: bool = False) -> str:
        """Returns the text that now certainly belongs to the output; empty after a match. early: a stop
        string does not count if it ends in this text; it may begin here."""
        if self._matched:
            return ""
        pending = self._held + text
        for index, character in enumerate(text, start=len(self._held)):
            lengths = [len(matcher.stop) for matcher in self._matchers if matcher.advance(character)]
            if lengths and not early:
                # If several stop strings end here, the longest began first.
                self._matched, self._held = True, ""
                return pending[: index + 1 - max(lengths)]
        held = max((matcher.state for matcher in self._matchers), default=0)
        self._held = pending[len(pending) - held :]
        return pending[: len(pending) - held]

    def flush(self) -> str:
        """Returns the text held back, once no more follows."""
        held, self._held = self._held, ""
        return held


class _Matcher:
    """`state`: how many leading characters of the stop string the text so far ends with."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.state = 0
        self._fallback = _fallbacks(stop)

    def advance(self, character: str) -> bool:
        """True when the whole stop string ends with this character."""
        while self.state and self.stop[self.state] != character:
            self.state = self._fallback[self.state - 1]
        if self.stop[self.state] == character:
            self.state += 1
        if self.state < len(self.stop):
            return False
        self.state = self._fallback[-1]
        return True


def _fallbacks(stop: str) -> list[int]:
    """[i]: length of the longest proper prefix of `stop` that also ends its first i + 1 characters."""
    fallbacks = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[length] != stop[index]:
            length = fallbacks[length - 1]
        if stop[length] == stop[index]:
            length += 1
        fallbacks[index] = length
    return fallbacks
