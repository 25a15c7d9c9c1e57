"""What a model's thoughts mean for a request: how they are found in its answer, and in its grammar."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_core.output_rules import Grammar
from dspark_core.tokenization.thoughts import ThoughtMarks, ThoughtStart
from dspark_core.tokenization.tokenizer import Tokenizer
from services.gateway.thoughts.thought_grammar import after_thought
from services.gateway.thoughts.thought_stream import ThoughtStream


@dataclass(frozen=True, slots=True, kw_only=True)
class ThoughtReading:
    """How to find the thought of an answer."""

    marks: ThoughtMarks
    begun: bool
    """The prompt has begun the thought."""
    shown_token_ids: frozenset[int]
    """Tokens that mark thoughts; elsewhere they may not be shown as text."""

    def stream(self) -> ThoughtStream:
        return ThoughtStream(self.marks, begun=self.begun)


class ThoughtPreparer:
    def __init__(self, tokenizer: Tokenizer, marks: ThoughtMarks) -> None:
        self._tokenizer = tokenizer
        self._marks = marks
        ids = (tokenizer.added_token_id(mark) for mark in marks.both)
        self._mark_ids = frozenset(mark for mark in ids if mark is not None)
        self._in_text = [one for one in tokenizer.shown_added_token_ids if one not in self._mark_ids]

    def reading(self, prompt: str) -> ThoughtReading | None:
        """prompt: the end of it, as text. None: no thought may follow."""
        start = self._marks.left_by(prompt)
        if start is ThoughtStart.CLOSED:
            return None
        return ThoughtReading(
            marks=self._marks, begun=start is ThoughtStart.OPEN, shown_token_ids=self._mark_ids
        )

    def grammar(self, answer: Grammar, reading: ThoughtReading) -> Grammar:
        """The grammar of a thought and the answer after it. Raises InvalidRequestError if it is too large."""
        token_id = self._tokenizer.added_token_id
        return after_thought(
            answer, reading.marks, begun=reading.begun, token_id=token_id, in_text=self._in_text
        )
