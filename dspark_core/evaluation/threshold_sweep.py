"""Estimates, from recorded rounds, the effect of verifying only tokens above a survival threshold.

A draft position is verified while its predicted survival a_k is at least the threshold. Rounds keep their
recorded anchors, although a real run with shorter prefixes would place them differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dspark_core.evaluation.acceptance import ratio
from dspark_core.evaluation.round_table import RoundTable

THRESHOLDS = tuple(step / 20 for step in range(20))
"""0, 0.05, ..., 0.95."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoint:
    threshold: float
    verify_length: float
    """Verified draft tokens per round."""
    acceptance_rate: float | None
    """Accepted share of the verified tokens; None if none were verified."""
    accepted_length: float


def sweep_thresholds(table: RoundTable, thresholds: Sequence[float] = THRESHOLDS) -> tuple[SweepPoint, ...]:
    """One point per threshold; empty without rounds or without predictions."""
    if not table.has_confidence:
        return ()
    return tuple(_point(table, threshold) for threshold in thresholds)


def _point(table: RoundTable, threshold: float) -> SweepPoint:
    # Survival never rises along a block, so the positions above the threshold form a prefix; the running
    # minimum ensures this whatever a source reports. NaN compares false.
    above = np.minimum.accumulate(table.survival, axis=1) >= threshold
    lengths = np.minimum(above.sum(axis=1), table.verified)
    accepted = np.minimum(table.accepted, lengths)
    # The bonus token follows a shortened prefix, unless a stop token ended the round earlier.
    committed = np.minimum(table.committed, lengths + 1)
    return SweepPoint(
        threshold=threshold,
        verify_length=float(lengths.mean()),
        acceptance_rate=ratio(int(accepted.sum()), int(lengths.sum())),
        accepted_length=float(committed.mean()),
    )
