"""Builds a draft block without a draft model, from matches in the sequence's own text and an n-gram table.

Each token comes from the source that is more likely right. Following the match extends it; once the table
overrules it, the rest of the match is ignored. Reference implementation of the native chain in
`kernels/csrc/lookup.h`.
"""

from __future__ import annotations

from collections.abc import Sequence

from dspark_core.algorithms.lookup_evidence import MATCH_CLASSES, Support, level_class
from dspark_core.algorithms.ngram_table import NgramTable
from dspark_core.algorithms.suffix_match import MAX_MATCH, SuffixMatch

LEAST_SURVIVAL = 0.04
"""A block ends before the first token whose survival is below this."""


def lookup_chain(
    table: NgramTable, tokens: Sequence[int], match: SuffixMatch | None, most: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """At most `most` tokens following `tokens`, and their conditional probabilities of acceptance c_1, ..."""
    rates = table.evidence.rates
    tail = list(tokens[-table.order :])
    followed, agreed = (match.token_ids, match.length) if match else ((), 0)
    drafted: list[int] = []
    confidences: list[float] = []
    survival = 1.0
    while len(drafted) < most:
        own = followed[len(drafted)] if len(drafted) < len(followed) else None
        matched = MATCH_CLASSES[min(agreed, MAX_MATCH)] if own is not None else 0
        found = table.find(tail)
        level = level_class(found[1] if found else None)
        if own is None and found is None:
            break
        if found and own == found[0]:
            token, confidence = own, rates[Support.BOTH, matched, level]
        else:
            token, confidence = -1, 0.0
            if own is not None:
                token, confidence = own, rates[Support.MATCH, matched, level]
            if found and rates[Support.TABLE, matched, level] > confidence:
                token, confidence = found[0], rates[Support.TABLE, matched, level]
                followed = ()
        survival *= float(confidence)
        if survival < LEAST_SURVIVAL:
            break
        agreed += 1
        drafted.append(token)
        confidences.append(float(confidence))
        tail = [*tail, token][-table.order :]
    return tuple(drafted), tuple(confidences)
