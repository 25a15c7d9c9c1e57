"""How well probabilities match outcomes: calibration error, ranking and Brier score. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

DEFAULT_BINS = 10


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """A range of neighbouring predictions; all bins of a diagram have about the same count."""

    count: int
    mean_predicted: float
    mean_observed: float


def reliability_bins(
    predicted: ArrayLike, observed: ArrayLike, bins: int = DEFAULT_BINS
) -> tuple[ReliabilityBin, ...]:
    """The reliability diagram of probabilities [n] against outcomes [n] in {0, 1}, lowest bin first.

    Binned as in `expected_calibration_error`; empty bins are omitted.
    """
    counts, sums, hits = _bin_sums(*_pair(predicted, observed), bins)
    return tuple(
        ReliabilityBin(int(count), float(total / count), float(hit / count))
        for count, total, hit in zip(counts, sums, hits, strict=True)
        if count
    )


def expected_calibration_error(predicted: ArrayLike, observed: ArrayLike, bins: int = DEFAULT_BINS) -> float:
    """Mean |predicted - observed| over bins of equal mass, weighted by their counts; 0.0 without data.

    predicted: probabilities [n]; observed: outcomes [n], 0 or 1. Equal predictions share a bin, so
    the order of the data does not matter. Bins of equal width would put nearly all late positions, whose
    survival is low, into one. Raises ValueError for other values or differing lengths.
    """
    probabilities, outcomes = _pair(predicted, observed)
    if not len(probabilities):
        return 0.0
    _, sums, hits = _bin_sums(probabilities, outcomes, bins)
    return float(np.abs(sums - hits).sum() / len(probabilities))


def area_under_roc(predicted: ArrayLike, observed: ArrayLike) -> float | None:
    """Probability that a positive ranks above a negative, ties counting half; None with one class only."""
    probabilities, outcomes = _pair(predicted, observed)
    positives = int(outcomes.sum())
    negatives = len(outcomes) - positives
    if not positives or not negatives:
        return None
    _, inverse, counts = np.unique(probabilities, return_inverse=True, return_counts=True)
    last_rank = np.cumsum(counts)
    mean_rank = last_rank - (counts - 1) / 2.0
    rank_sum = float(mean_rank[inverse][outcomes == 1.0].sum())
    return (rank_sum - positives * (positives + 1) / 2.0) / (positives * negatives)


def brier_score(predicted: ArrayLike, observed: ArrayLike) -> float:
    """Mean squared difference between probabilities [n] and outcomes [n]; 0.0 without data."""
    probabilities, outcomes = _pair(predicted, observed)
    return float(np.mean((probabilities - outcomes) ** 2)) if len(probabilities) else 0.0


def _pair(predicted: ArrayLike, observed: ArrayLike) -> tuple[Floats, Floats]:
    probabilities = np.asarray(predicted, dtype=np.float64)
    outcomes = np.asarray(observed, dtype=np.float64)
    if probabilities.ndim != 1 or probabilities.shape != outcomes.shape:
        raise ValueError(
            f"predicted and observed must be two lists of one length, "
            f"got shapes {probabilities.shape} and {outcomes.shape}"
        )
    require_within(probabilities, "predicted")
    if not np.isin(outcomes, (0.0, 1.0)).all():
        raise ValueError("observed must hold nothing but 0 and 1")
    return probabilities, outcomes


def require_within(probabilities: Floats, name: str) -> None:
    wrong = ~((probabilities >= 0.0) & (probabilities <= 1.0))
    if wrong.any():
        raise ValueError(f"{name} must be in [0, 1], got {probabilities[wrong].flat[0]}")


def _bin_sums(probabilities: Floats, outcomes: Floats, bins: int) -> tuple[NDArray[np.intp], Floats, Floats]:
    """Per bin: count, sum of predictions, sum of outcomes."""
    if bins < 1:
        raise ValueError(f"bins must be >= 1, got {bins}")
    _, group, counts = np.unique(probabilities, return_inverse=True, return_counts=True)
    middle_rank = np.cumsum(counts) - (counts + 1) / 2.0  # [distinct values], from 0
    index = (middle_rank * bins / max(1, len(probabilities))).astype(np.intp)[group]
    return (
        np.bincount(index, minlength=bins),
        np.asarray(np.bincount(index, probabilities, minlength=bins), dtype=np.float64),
        np.asarray(np.bincount(index, outcomes, minlength=bins), dtype=np.float64),
    )
