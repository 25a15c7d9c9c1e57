"""Grammars of answers that a thought may precede."""

from __future__ import annotations

import json
from collections.abc import Sequence

from dspark_core.output_rules import Grammar, GrammarKind
from dspark_core.tokenization.grammar_sources import lark_source
from dspark_core.tokenization.thoughts import ThoughtMarks
from services.gateway.marks import TokenIds, mark_source, token_set

MOST_LINES = 2
"""Between a thought and its answer: a small model may write line ends for ever."""


def after_thought(
    answer: Grammar, marks: ThoughtMarks, *, begun: bool, token_id: TokenIds, in_text: Sequence[int] = ()
) -> Grammar:
    """The answer, behind a thought without rules. begun: the thought has begun, so it has to end; otherwise
    there may be none. in_text: ids of added tokens that may occur in a thought. Raises InvalidRequestError if
    the grammar is too large, or its schema is not JSON."""
    begin_id, end_id = (token_id(mark) for mark in marks.both)
    begin = "" if begun else mark_source(marks.begin, begin_id)
    # To the parser an added token is not text: TEXT ends before each one.
    other = [f"other: {token_set(in_text)}"] if in_text else []
    said = "(TEXT other)* " if other else ""
    lines = [
        f"start: {'thought' if begun else 'thought?'} answer",
        f"thought: {begin} {said}ended GAP",
        # If the mark is text, the lexeme must end (lazily) at the first one.
        f"ended[lazy]: TEXT {json.dumps(marks.end)}"
        if end_id is None
        else f"ended: TEXT {token_set([end_id])}",
        *other,
        r"TEXT: /(.|\n)*/",
        rf"GAP: /\n{{0,{MOST_LINES}}}/",
        # A grammar of its own, whose names are not these.
        f"answer: %lark {{\n{lark_source(answer)}\n}}",
    ]
    return Grammar(kind=GrammarKind.LARK, text="\n".join(lines))
