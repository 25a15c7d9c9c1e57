"""Measures how often tokens from a table and from matches in the text are right, on held-out answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dspark_core.algorithms.lookup_evidence import (
    CLASS_SHAPE,
    MATCH_CLASSES,
    LookupEvidence,
    Support,
    level_class,
    measured_rates,
)
from dspark_core.algorithms.ngram_table import NgramTable
from dspark_core.algorithms.suffix_match import SuffixIndex
from dspark_core.training.data.conversations import Conversation


@dataclass(frozen=True, slots=True)
class Trial:
    """Accuracy of a table on answers it was not built from."""

    evidence: LookupEvidence
    tokens: int
    table: float
    """Share of tokens that the table predicts correctly, regardless of the match in the text."""
    match: float
    """Share of tokens that the match predicts correctly."""
    either: float


def try_table(table: NgramTable, conversations: Sequence[Conversation]) -> Trial:
    """Looks up both sources before every answer token but the first."""
    stood, judged = np.zeros(CLASS_SHAPE), np.zeros(CLASS_SHAPE)
    tokens = by_table = by_match = by_either = 0
    for conversation in conversations:
        index, text = SuffixIndex(), [*conversation.prompt_ids, conversation.answer_ids[0]]
        for token in conversation.answer_ids[1:]:
            match, found = index.longest(text, 1), table.find(text)
            matched = MATCH_CLASSES[match.length] if match else 0
            level = level_class(found[1] if found else None)
            of_match, of_table = match.token_ids[0] if match else None, found[0] if found else None
            for support, said in _supports(of_match, of_table):
                judged[support, matched, level] += 1.0
                stood[support, matched, level] += said == token
            tokens += 1
            by_table += of_table == token
            by_match += of_match == token
            by_either += token in (of_table, of_match)
            text.append(token)
    seen = max(tokens, 1)
    evidence = LookupEvidence(measured_rates(stood, judged))
    return Trial(evidence, tokens, by_table / seen, by_match / seen, by_either / seen)


def _supports(of_match: int | None, of_table: int | None) -> list[tuple[Support, int]]:
    """The distinct proposals, each with its source; one entry when both agree."""
    if of_match is not None and of_match == of_table:
        return [(Support.BOTH, of_match)]
    proposed = ((Support.MATCH, of_match), (Support.TABLE, of_table))
    return [(support, token) for support, token in proposed if token is not None]
