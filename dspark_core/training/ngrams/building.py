"""Builds an n-gram table from answers, without the entries that shorter contexts already imply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dspark_core.algorithms.lookup_evidence import LookupEvidence, prior_rates
from dspark_core.algorithms.ngram_table import MAX_ORDER, NgramTable, build_slots, levels_of
from dspark_core.errors import ConfigError
from dspark_core.training.data.conversations import Conversation
from dspark_core.training.ngrams.counting import NgramCounts, answer_tokens
from dspark_core.training.ngrams.evidence import Trial, try_table

SAME_LEVELS = 12
"""An entry is redundant if its shorter context predicts the same token at a level within this distance."""
LEAST_HELD_OUT, MOST_HELD_OUT = 10, 600
"""Bounds on the number of answers held out to evaluate the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramOptions:
    order: int = 4
    """Longest context, in tokens."""
    min_count: int = 2
    """Contexts of three or more tokens that were seen less often are left out."""

    def __post_init__(self) -> None:
        """Raises ConfigError naming the flag."""
        if not 1 <= self.order <= MAX_ORDER:
            raise ConfigError(f"--order must be in [1, {MAX_ORDER}], got {self.order}")
        if self.min_count < 1:
            raise ConfigError(f"--min-count must be >= 1, got {self.min_count}")


def build_table(
    conversations: Sequence[Conversation],
    vocab_size: int,
    options: NgramOptions,
    evidence: LookupEvidence | None = None,
) -> NgramTable:
    """`evidence`: measured acceptance of such a table's tokens; None: prior rates."""
    counts = NgramCounts(answer_tokens(conversations, options.order), vocab_size)
    keys, tokens, levels = [], [], []
    # Per shorter context, the token and level the table would return for it.
    said, said_level = np.array([-1]), np.array([0])
    for length, contexts in enumerate(counts.contexts, start=1):
        level = levels_of(contexts.probabilities)
        before, before_level = said[contexts.shorter], said_level[contexts.shorter]
        same = (before == contexts.tokens) & (np.abs(before_level - level) <= SAME_LEVELS)
        kept = ~same & (contexts.counts >= (options.min_count if length > 2 else 1))
        keys.append(contexts.keys[kept])
        tokens.append(contexts.tokens[kept])
        levels.append(level[kept])
        said = np.where(kept, contexts.tokens, before)
        said_level = np.where(kept, level, before_level)
    slots = build_slots(np.concatenate(keys), np.concatenate(tokens), np.concatenate(levels))
    return NgramTable(options.order, *slots, evidence or LookupEvidence(prior_rates()))


@dataclass(frozen=True, slots=True)
class TrainedTable:
    table: NgramTable
    trial: Trial
    """Trial on the held-out answers of a table built from the others."""


def train_table(
    conversations: Sequence[Conversation], vocab_size: int, options: NgramOptions | None = None
) -> TrainedTable:
    """A table of all answers, with the evidence of a table built without the held-out ones.

    Raises ConfigError for too few answers to hold some out.
    """
    options = options or NgramOptions()
    if len(conversations) < LEAST_HELD_OUT * 10:
        raise ConfigError(
            f"{len(conversations)} answers are too few for a table: at least {LEAST_HELD_OUT * 10} are needed"
        )
    every = max(10, len(conversations) // MOST_HELD_OUT)
    held_out = conversations[::every]
    learned = [one for number, one in enumerate(conversations) if number % every]
    trial = try_table(build_table(learned, vocab_size, options), held_out)
    return TrainedTable(build_table(conversations, vocab_size, options, trial.evidence), trial)
