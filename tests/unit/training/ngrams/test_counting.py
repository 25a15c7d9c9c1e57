"""Interpolated n-gram probabilities against sums written out."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_core.algorithms.ngram_table import context_key
from dspark_core.training.data.conversations import Conversation
from dspark_core.training.ngrams.counting import DISCOUNT, NgramCounts, answer_tokens

VOCAB = 6
TOKENS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12).map(tuple)
CONVERSATIONS = st.lists(st.builds(Conversation, TOKENS, TOKENS), min_size=1, max_size=6)


class Naive:
    def __init__(self, conversations: list[Conversation], order: int) -> None:
        self.followed: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for one in conversations:
            text = (*one.prompt_ids, *one.answer_ids)
            for place in range(len(one.prompt_ids), len(text)):
                for length in range(min(order, place) + 1):
                    self.followed[text[place - length : place]][text[place]] += 1

    def probability(self, context: tuple[int, ...], token: int) -> float:
        seen = self.followed[context]
        if not context:
            return seen[token] / seen.total()
        left = DISCOUNT * len(seen) / seen.total()
        return max(seen[token] - DISCOUNT, 0.0) / seen.total() + left * self.probability(context[1:], token)


@settings(max_examples=60)
@given(CONVERSATIONS, st.integers(1, 4))
def test_contexts_name_their_likeliest_token(conversations: list[Conversation], order: int) -> None:
    naive = Naive(conversations, order)
    counts = NgramCounts(answer_tokens(conversations, order), VOCAB)
    expected = {context_key(context): context for context in naive.followed if context}
    assert sum(len(contexts.keys) for contexts in counts.contexts) == len(expected)
    for contexts in counts.contexts:
        rows = zip(contexts.keys, contexts.counts, contexts.tokens, contexts.probabilities, strict=True)
        for key, count, token, probability in rows:
            context = expected[int(key)]
            assert count == naive.followed[context].total()
            assert probability == pytest.approx(naive.probability(context, int(token)))
            best = max(naive.probability(context, other) for other in range(VOCAB))
            assert probability == pytest.approx(best)


@given(CONVERSATIONS)
def test_shorter_contexts_are_named(conversations: list[Conversation]) -> None:
    counts = NgramCounts(answer_tokens(conversations, 3), VOCAB)
    known = {context_key(context): context for context in Naive(conversations, 3).followed}
    for shorter, longer in zip(counts.contexts, counts.contexts[1:], strict=False):
        for key, place in zip(longer.keys, longer.shorter, strict=True):
            assert known[int(shorter.keys[place])] == known[int(key)][1:]


def test_an_answer_follows_its_prompt_and_nothing_of_other_answers() -> None:
    told = answer_tokens([Conversation((1, 2), (3, 4)), Conversation((5,), (0,))], order=3)
    assert told.windows.tolist() == [[0, 1, 2, 3], [1, 2, 3, 4], [0, 0, 5, 0]]
    assert told.before.tolist() == [2, 3, 1]
    assert told.windows.dtype == np.int32
