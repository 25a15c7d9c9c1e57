"""Tells the thought at the beginning of an answer from the rest, in text that arrives in pieces."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dspark_core.tokenization.thoughts import ThoughtMarks
from services.gateway.marks import suffix_that_begins


@dataclass(frozen=True, slots=True)
class Split:
    thought: str
    answer: str
    aside: int = 0
    """How many characters proved not to be of the answer: the thought, its marks and whitespace around it."""


class _Place(Enum):
    START = "where the mark of a thought may come"
    THOUGHT = "in the thought"
    GAP = "in the whitespace between thought and answer"
    ANSWER = "behind it"


class ThoughtStream:
    """Splits one answer. Feed it all of the text, then `flush`. Whitespace around the thought is dropped."""

    def __init__(self, marks: ThoughtMarks, *, begun: bool) -> None:
        """begun: the prompt has begun the thought. Some models then write the mark once more."""
        self._marks = marks
        self._begun = begun
        self._place = _Place.START
        self._pending = ""
        self._said = False

    @property
    def thinking(self) -> bool:
        """Whether the text so far ends inside the thought."""
        return self._place is _Place.THOUGHT or (self._begun and self._place is _Place.START)

    def push(self, text: str) -> Split:
        if self._place is _Place.ANSWER:
            return Split("", text)
        rest = whole = self._pending + text
        thought = answer = ""
        if self._place is _Place.START:
            rest = self._look_for_begin(rest)
        if self._place is _Place.THOUGHT:
            thought, rest = self._look_for_end(rest)
        if self._place is _Place.GAP:
            rest = rest.lstrip()
            self._place = _Place.ANSWER if rest else _Place.GAP
        if self._place is _Place.ANSWER:
            answer, rest = rest, ""
        self._pending = rest
        return Split(thought, answer, len(whole) - len(answer) - len(rest))

    def flush(self) -> Split:
        """Returns what was held back, once no more text follows."""
        held, self._pending = self._pending, ""
        if self.thinking:
            return Split(held.strip() if not self._said else held.rstrip(), "", len(held))
        return Split("", held)

    def _look_for_begin(self, text: str) -> str:
        """Returns the text that remains to be examined."""
        begin, written = self._marks.begin, text.lstrip()
        if written.startswith(begin):
            self._place = _Place.THOUGHT
            return written[len(begin) :]
        if not begin.startswith(written):
            self._place = _Place.THOUGHT if self._begun else _Place.ANSWER
        return text

    def _look_for_end(self, text: str) -> tuple[str, str]:
        """The part of the thought that is certain, and the text that remains to be examined."""
        if not self._said:
            text = text.lstrip()
        end = text.find(self._marks.end)
        if end >= 0:
            self._place = _Place.GAP
            return text[:end].rstrip(), text[end + len(self._marks.end) :]
        # Whitespace is held back too: it is dropped if the mark follows.
        thought = text[: len(text) - suffix_that_begins(self._marks.end, text)].rstrip()
        self._said = self._said or bool(thought)
        return thought, text[len(thought) :]
