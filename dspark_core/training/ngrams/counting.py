"""Interpolated n-gram model: counts contexts and the tokens that follow them.

p_n(w | context) = max(c(w) - D, 0) / c + D u / c p_{n-1}(w | shorter context): absolute discounting
(Ney, Essen and Kneser, 1994), where u is the number of distinct following tokens and p_0 the share of
each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dspark_core.algorithms.ngram_table import Words, context_keys
from dspark_core.training.data.conversations import Conversation

DISCOUNT = 0.75

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class AnswerTokens:
    """Every answer token with its preceding tokens."""

    windows: npt.NDArray[np.int32]
    """[tokens, order + 1]: the `order` tokens before each answer token, then the token itself."""
    before: Ints
    """[tokens] how many of the preceding tokens exist, the prompt's included; the rest is padding."""


@dataclass(frozen=True, slots=True)
class Contexts:
    """The distinct contexts of one length, in no particular order."""

    keys: Words
    counts: Ints
    tokens: Ints
    """The most likely next token of each; the lowest id among equals."""
    probabilities: Floats
    shorter: Ints
    """Index of each context without its oldest token among the contexts one token shorter."""


def answer_tokens(conversations: Sequence[Conversation], order: int) -> AnswerTokens:
    parts, before = [], []
    for conversation in conversations:
        prompt = conversation.prompt_ids[-order:]
        row = np.array((*(0,) * (order - len(prompt)), *prompt, *conversation.answer_ids), dtype=np.int32)
        parts.append(np.lib.stride_tricks.sliding_window_view(row, order + 1))
        before.append(np.minimum(len(prompt) + np.arange(len(conversation.answer_ids)), order))
    return AnswerTokens(np.concatenate(parts), np.concatenate(before))


class NgramCounts:
    """`contexts[n - 1]`: the contexts of n tokens in the answers."""

    def __init__(self, answers: AnswerTokens, vocab_size: int) -> None:
        self._next = answers.windows[:, -1].astype(np.int64)
        self._windows = answers.windows[:, :-1]
        self._before = answers.before
        self._vocab_size = vocab_size
        self.contexts = self._count()

    def _count(self) -> list[Contexts]:
        order = self._windows.shape[1]
        shares = np.bincount(self._next, minlength=self._vocab_size) / len(self._next)
        best = int(shares.argmax())
        empty = np.zeros(1, dtype=np.int64)
        found = [Contexts(np.zeros(1, dtype=np.uint64), empty, empty + best, shares[best : best + 1], empty)]
        # Per answer token: the index of its context one token shorter, and its probability after that.
        place, likely = np.zeros(len(self._next), dtype=np.int64), shares[self._next]
        for length in range(1, order + 1):
            rows = np.flatnonzero(self._before >= length)
            if not len(rows):
                break
            keys = context_keys(self._windows[rows, order - length :])
            contexts, places, values = self._of_length(keys, rows, place[rows], likely[rows], found[-1])
            found.append(contexts)
            place, likely = np.full(len(self._next), -1, dtype=np.int64), np.zeros(len(self._next))
            place[rows], likely[rows] = places, values
        return found[1:]

    def _of_length(
        self, keys: Words, rows: Ints, shorter: Ints, lower: Floats, known: Contexts
    ) -> tuple[Contexts, Ints, Floats]:
        """Per occurrence: keys, its context; rows, its index among the answer tokens; shorter, its shorter
        context; lower, the probability there -> contexts; each occurrence's context and probability."""
        different, firsts, places, counts = np.unique(
            keys, return_index=True, return_inverse=True, return_counts=True
        )
        pairs, pair_firsts, pair_places, pair_counts = np.unique(
            places * self._vocab_size + self._next[rows],
            return_index=True,
            return_inverse=True,
            return_counts=True,
        )
        context, token = pairs // self._vocab_size, pairs % self._vocab_size
        followers = np.bincount(context, minlength=len(different))
        left = DISCOUNT * followers / counts  # mass that discounting leaves to shorter contexts
        likely = np.maximum(pair_counts - DISCOUNT, 0.0) / counts[context]
        likely += left[context] * lower[pair_firsts]
        ranked = np.lexsort((token, -likely, context))
        best = ranked[np.unique(context[ranked], return_index=True)[1]]
        tokens, probabilities = token[best], likely[best]
        # A token never seen after a context may still be the most likely, through the shorter context.
        inherited = left * known.probabilities[shorter[firsts]]
        unseen = inherited > probabilities
        tokens = np.where(unseen, known.tokens[shorter[firsts]], tokens)
        probabilities = np.where(unseen, inherited, probabilities)
        contexts = Contexts(different, counts, tokens, probabilities, shorter[firsts])
        return contexts, places.astype(np.int64), likely[pair_places]
