"""Acceptance rates of looked-up tokens, by the evidence for them.

Two sources propose the next token: the continuation of an earlier occurrence of the sequence's current
suffix (`suffix_match`), more reliable the longer the match, and the target's n-gram table
(`ngram_table`), more reliable the higher its level. Where both agree, the token is accepted more often than
either predicts; where they differ, a long match is nearly always right, and so is a confident table
against a match of one token. Each of these cases has one rate, measured on answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from dspark_core.algorithms.suffix_match import MAX_MATCH

MATCH_STEPS = (1, 2, 3, 4, 5, 8, 12, 16)
"""Lower bounds of the match classes: 5 to 7 tokens are one class, and so on; class 0 is no match."""
LEVEL_CLASSES = 16
"""Classes of the table's 256 levels; class 16 is no entry."""
CLASS_SHAPE = (3, 1 + len(MATCH_STEPS), LEVEL_CLASSES + 1)
MATCH_CLASSES = tuple(sum(step <= length for step in MATCH_STEPS) for length in range(MAX_MATCH + 1))
"""Match class by match length."""
PRIOR_WEIGHT = 6.0
"""Weight of the prior rate of a class, in tokens."""
PRIOR_RATES = (0.24, 0.5, 0.64, 0.7, 0.73, 0.75, 0.78, 0.8, 0.85, 0.88, 0.9, 0.91, 0.92, 0.92, 0.93, 0.94)
"""Rates of matches of 1, 2, ... tokens alone, measured on greedy answers (benchmarks of docs/results.md)."""


class Support(IntEnum):
    """The source or sources that propose a token."""

    MATCH = 0
    """The match; the table has no entry or proposes another token."""
    TABLE = 1
    """The table; there is no match, or it proposes another token."""
    BOTH = 2


@dataclass(frozen=True, slots=True)
class LookupEvidence:
    """`rates` [support, match class, level class] float32: the share of such tokens that was accepted."""

    rates: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        """Raises ValueError for another shape or dtype, or rates outside (0, 1)."""
        if self.rates.shape != CLASS_SHAPE or self.rates.dtype != np.float32:
            raise ValueError(
                f"rates must be float32 {CLASS_SHAPE}, got {self.rates.dtype} {self.rates.shape}"
            )
        if not ((self.rates > 0.0) & (self.rates < 1.0)).all():
            raise ValueError("rates must lie between 0 and 1")


def level_class(level: int | None) -> int:
    return LEVEL_CLASSES if level is None else level * LEVEL_CLASSES >> 8


def prior_rates() -> npt.NDArray[np.float32]:
    """Rates before any measurement: sources err independently, and matches overrule the table.

    A table token that contradicts a match is worth half as much for each token of the match's length.
    """
    matched = np.array([PRIOR_RATES[step - 1] for step in MATCH_STEPS])
    depth = (np.arange(LEVEL_CLASSES) + 0.5) / LEVEL_CLASSES
    known = 1.0 - (1.0 - depth) ** 2  # inverse of `levels_of`
    rates = np.full(CLASS_SHAPE, 0.01)
    rates[Support.MATCH, 1:, :] = matched[:, None]
    rates[Support.TABLE, 0, :-1] = known
    rates[Support.TABLE, 1:, :-1] = known * 0.5 ** np.array(MATCH_STEPS)[:, None]
    rates[Support.BOTH, 1:, :-1] = 1.0 - (1.0 - matched[:, None]) * (1.0 - known)
    return _as_rates(rates)


def measured_rates(
    stood: npt.NDArray[np.float64], judged: npt.NDArray[np.float64]
) -> npt.NDArray[np.float32]:
    """Counts accepted and judged, each [support, match class, level class] -> rates."""
    return _as_rates((stood + PRIOR_WEIGHT * prior_rates()) / (judged + PRIOR_WEIGHT))


def _as_rates(shares: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    rates: npt.NDArray[np.float32] = np.clip(shares, 0.01, 0.99).astype(np.float32)
    return rates
