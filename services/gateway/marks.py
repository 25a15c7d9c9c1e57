"""Marks that a model sets around parts of its answer: in grammars, and in text that arrives in pieces."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

TokenIds = Callable[[str], int | None]
"""Maps a text to its id if it is a single added token of the model, else to None."""


def mark_source(mark: str, token_id: int | None) -> str:
    """The mark in a grammar. token_id: its added token; None: it is written as text."""
    return json.dumps(mark) if token_id is None else token_set([token_id])


def token_set(token_ids: Sequence[int]) -> str:
    """A set of tokens as ranges: models may have thousands of added tokens, mostly with consecutive ids."""
    ranges: list[list[int]] = []
    for token_id in sorted(token_ids):
        if ranges and ranges[-1][1] == token_id - 1:
            ranges[-1][1] = token_id
        else:
            ranges.append([token_id, token_id])
    return f"<[{','.join(str(a) if a == b else f'{a}-{b}' for a, b in ranges)}]>"


def suffix_that_begins(mark: str, text: str) -> int:
    """Length of the longest proper prefix of `mark` that the text ends with."""
    return next((size for size in range(len(mark) - 1, 0, -1) if text.endswith(mark[:size])), 0)
