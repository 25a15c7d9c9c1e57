"""Measures how well predicted survival matches outcomes: calibration error, AUC, Brier score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dspark_core.algorithms.calibration_error import area_under_roc, brier_score, expected_calibration_error
from dspark_core.evaluation.round_table import RoundTable


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionConfidence:
    """Draft position k: predicted survival a_k against whether tokens 1..k were all accepted."""

    position: int
    rounds: int
    predicted: float
    observed: float
    ece: float
    auc: float | None
    """None when all outcomes are the same."""
    brier: float


def measure_confidence(table: RoundTable) -> tuple[PositionConfidence, ...]:
    """The positions that have a prediction with a known outcome, in order."""
    measured = []
    for position in range(1, table.positions + 1):
        column = table.survival[:, position - 1]
        usable = table.known(position) & np.isfinite(column)
        if not usable.any():
            continue
        predicted = column[usable]
        outcome = table.survived(position)[usable].astype(np.float64)
        measured.append(
            PositionConfidence(
                position=position,
                rounds=len(predicted),
                predicted=float(predicted.mean()),
                observed=float(outcome.mean()),
                ece=expected_calibration_error(predicted, outcome),
                auc=area_under_roc(predicted, outcome),
                brier=brier_score(predicted, outcome),
            )
        )
    return tuple(measured)
