"""How far survival estimates can be trusted, and sequential temperature scaling to correct them.

The confidence head says c_k, the chance that draft token k is accepted given that all before it
were; survival a_k = c_1 ... c_k is what verify lengths are planned from. An error in c_1 is in every
a_k, so temperatures are fitted to the products, left to right (paper, calibration). No torch here,
so the scheduler image stays small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dspark_core.errors import ConfigError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

DEFAULT_BINS = 10
MAX_LOGIT = 20.0
"""What stands for a confidence of exactly 0 or 1: float32 cannot tell it from a larger one."""

# Bounded, because at a very high temperature every estimate is the same: well calibrated, and useless.
_TEMPERATURES = tuple(1.02**step for step in sorted(range(-80, 81), key=abs))


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Predictions next to each other in size; all bins of a diagram hold about as many."""

    count: int
    mean_predicted: float
    mean_observed: float


def reliability_bins(
    predicted: ArrayLike, observed: ArrayLike, bins: int = DEFAULT_BINS
) -> tuple[ReliabilityBin, ...]:
    """The reliability diagram of probabilities [n] against outcomes [n] in {0, 1}, lowest first.

    Bins as for `expected_calibration_error`; empty ones are left out.
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
    the order of the data does not matter. Bins of equal width would hold nearly all late positions,
    where survival is low, in one. Raises ValueError for other values, or for lengths that differ.
    """
    probabilities, outcomes = _pair(predicted, observed)
    if not len(probabilities):
        return 0.0
    _, sums, hits = _bin_sums(probabilities, outcomes, bins)
    return float(np.abs(sums - hits).sum() / len(probabilities))


def area_under_roc(predicted: ArrayLike, observed: ArrayLike) -> float | None:
    """Chance that a positive ranks above a negative, ties counting half; None with one class only."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionQuality:
    """Survival estimates of one draft position against whether its token survived."""

    rounds: int
    """That proposed the position."""
    ece: float
    auc: float | None
    """None when every token survived, or none."""
    brier: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Temperatures of a drafter's confidence head, and what they did to the calibration error.

    Every tuple has one value per draft position. The errors are of survival, at temperature 1
    (before) and at `temperatures` (after).
    """

    temperatures: tuple[float, ...]
    rounds: tuple[int, ...]
    """Fitted to so many."""
    ece_before: tuple[float, ...]
    ece_after: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.temperatures:
            raise ConfigError("temperatures of a calibration must not be empty")
        for name in ("rounds", "ece_before", "ece_after"):
            values = getattr(self, name)
            if len(values) != len(self.temperatures):
                raise ConfigError(
                    f"{name} must have one value for each of {len(self.temperatures)} temperatures, "
                    f"got {len(values)}"
                )
        for value in self.temperatures:
            if not (math.isfinite(value) and value > 0.0):
                raise ConfigError(f"temperatures must be positive numbers, got {value}")

    def to_dict(self) -> dict[str, object]:
        """JSON-able; `from_dict` is its inverse."""
        return {name: list(values) for name, values in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Calibration:
        """Ignores fields it does not know. Raises ConfigError naming a field that is wrong."""
        rounds = _numbers(data, "rounds")
        if not all(value.is_integer() and value >= 0 for value in rounds):
            raise ConfigError(f"rounds must be whole numbers, got {list(rounds)}")
        return cls(
            temperatures=_numbers(data, "temperatures"),
            rounds=tuple(int(value) for value in rounds),
            ece_before=_numbers(data, "ece_before"),
            ece_after=_numbers(data, "ece_after"),
        )


def confidence_logits(confidences: ArrayLike) -> Floats:
    """Inverse of the sigmoid, elementwise, within [-MAX_LOGIT, MAX_LOGIT]; NaN stays NaN."""
    values = np.asarray(confidences, dtype=np.float64)
    known = values[~np.isnan(values)]
    _require_within(known, "confidences")
    with np.errstate(divide="ignore"):
        logits: Floats = np.log(values) - np.log1p(-values)
    return np.clip(logits, -MAX_LOGIT, MAX_LOGIT)


def calibrated_confidences(logits: ArrayLike, temperatures: Sequence[float]) -> Floats:
    """Confidence logits [..., block] -> probabilities, position k's logit divided by temperature k."""
    scaled = np.asarray(logits, dtype=np.float64) / np.asarray(temperatures, dtype=np.float64)
    # log-sum-exp form: no overflow, and small probabilities keep their precision.
    return np.asarray(np.exp(-np.logaddexp(0.0, -scaled)), dtype=np.float64)


def fit_sequential_temperatures(
    logits: ArrayLike, accepted: ArrayLike, proposed: ArrayLike, *, bins: int = DEFAULT_BINS
) -> tuple[float, ...]:
    """The temperature of each position that minimises the ECE of survival, those before it fixed.

    logits: confidence logits [rounds, block]; accepted and proposed: draft tokens [rounds]. Position
    k counts in rounds that proposed it, survived where accepted >= k; what lies beyond `proposed` is
    not read. It must not have been chosen by looking at the block (verify everything, as
    `FullPlanSource` does), or the fit is biased. A position that no round proposed keeps 1.
    Raises ValueError for shapes that do not fit each other, or values out of range.
    """
    values, lengths, limits = _rounds(logits, accepted, proposed)
    survival = np.ones(len(values))
    temperatures = []
    for position in range(values.shape[1]):
        rows = limits > position
        column, before = values[rows, position : position + 1], survival[rows]
        outcomes = (lengths[rows] > position).astype(np.float64)
        temperature = _best_temperature(column, before, outcomes, bins)
        temperatures.append(temperature)
        survival[rows] = before * calibrated_confidences(column, (temperature,))[:, 0]
    return tuple(temperatures)


def position_quality(
    logits: ArrayLike,
    accepted: ArrayLike,
    proposed: ArrayLike,
    temperatures: Sequence[float] | None = None,
    *,
    bins: int = DEFAULT_BINS,
) -> tuple[PositionQuality, ...]:
    """Survival at the given temperatures (None: 1) by position; arguments as for the fit."""
    return tuple(
        PositionQuality(
            rounds=len(predicted),
            ece=expected_calibration_error(predicted, observed, bins),
            auc=area_under_roc(predicted, observed),
            brier=brier_score(predicted, observed),
        )
        for predicted, observed in survival_by_position(logits, accepted, proposed, temperatures)
    )


def survival_by_position(
    logits: ArrayLike, accepted: ArrayLike, proposed: ArrayLike, temperatures: Sequence[float] | None = None
) -> tuple[tuple[Floats, Floats], ...]:
    """Per position: estimates [n] and outcomes [n] over the n rounds that proposed it."""
    values, lengths, limits = _rounds(logits, accepted, proposed)
    block = values.shape[1]
    if temperatures is not None and len(temperatures) != block:
        raise ValueError(f"temperatures must have one value for each of {block}, got {len(temperatures)}")
    survival = np.cumprod(calibrated_confidences(values, temperatures or (1.0,) * block), axis=1)
    return tuple(
        (survival[limits > k, k], (lengths[limits > k] > k).astype(np.float64)) for k in range(block)
    )


def calibrate(
    logits: ArrayLike, accepted: ArrayLike, proposed: ArrayLike, *, bins: int = DEFAULT_BINS
) -> Calibration:
    """Fits the temperatures, and measures on the same rounds what they improve."""
    temperatures = fit_sequential_temperatures(logits, accepted, proposed, bins=bins)
    before = position_quality(logits, accepted, proposed, bins=bins)
    after = position_quality(logits, accepted, proposed, temperatures, bins=bins)
    return Calibration(
        temperatures=temperatures,
        rounds=tuple(quality.rounds for quality in before),
        ece_before=tuple(quality.ece for quality in before),
        ece_after=tuple(quality.ece for quality in after),
    )


def _best_temperature(column: Floats, before: Floats, outcomes: Floats, bins: int) -> float:
    """Of equally good ones that nearest to 1: the grid is in that order.

    column: logits [n, 1]; before: survival up to the position before [n].
    """
    best, lowest = 1.0, math.inf
    for temperature in _TEMPERATURES:
        survival = before * calibrated_confidences(column, (temperature,))[:, 0]
        error = expected_calibration_error(survival, outcomes, bins)
        if error < lowest:
            best, lowest = temperature, error
    return best


def _rounds(logits: ArrayLike, accepted: ArrayLike, proposed: ArrayLike) -> tuple[Floats, Integers, Integers]:
    """Checked; logits beyond `proposed` become 0."""
    values = np.asarray(logits, dtype=np.float64)
    lengths, limits = np.asarray(accepted, dtype=np.int64), np.asarray(proposed, dtype=np.int64)
    if values.ndim != 2 or lengths.shape != values.shape[:1] or limits.shape != lengths.shape:
        raise ValueError(
            "logits must be [rounds, block], accepted and proposed [rounds], "
            f"got {values.shape}, {lengths.shape} and {limits.shape}"
        )
    if ((lengths < 0) | (lengths > limits) | (limits > values.shape[1])).any():
        raise ValueError(f"0 <= accepted <= proposed <= block ({values.shape[1]}) must hold in every round")
    read = np.arange(values.shape[1]) < limits[:, None]
    if not np.isfinite(values[read]).all():
        raise ValueError("logits of proposed positions must be finite")
    return np.where(read, values, 0.0), lengths, limits


def _numbers(data: Mapping[str, object], field: str) -> tuple[float, ...]:
    values = data.get(field)
    numeric = isinstance(values, list) and all(type(value) in (int, float) for value in values)
    if not isinstance(values, list) or not numeric:
        raise ConfigError(f"{field} must be a list of numbers, got {values!r}")
    return tuple(float(value) for value in values)


def _pair(predicted: ArrayLike, observed: ArrayLike) -> tuple[Floats, Floats]:
    probabilities = np.asarray(predicted, dtype=np.float64)
    outcomes = np.asarray(observed, dtype=np.float64)
    if probabilities.ndim != 1 or probabilities.shape != outcomes.shape:
        raise ValueError(
            f"predicted and observed must be two lists of one length, "
            f"got shapes {probabilities.shape} and {outcomes.shape}"
        )
    _require_within(probabilities, "predicted")
    if not np.isin(outcomes, (0.0, 1.0)).all():
        raise ValueError("observed must hold nothing but 0 and 1")
    return probabilities, outcomes


def _require_within(probabilities: Floats, name: str) -> None:
    wrong = ~((probabilities >= 0.0) & (probabilities <= 1.0))
    if wrong.any():
        raise ValueError(f"{name} must be in [0, 1], got {probabilities[wrong].flat[0]}")


def _bin_sums(probabilities: Floats, outcomes: Floats, bins: int) -> tuple[NDArray[np.intp], Floats, Floats]:
    """Per bin: how many, the sum of predictions, the sum of outcomes."""
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
