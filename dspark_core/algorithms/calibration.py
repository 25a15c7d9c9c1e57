"""Sequential scaling of a drafter's confidences, to make survival estimates reliable.

The confidence head outputs c_k, the probability that draft token k is accepted given that all before it
were; verify lengths are planned from the survival a_k = c_1 ... c_k. An error in c_1 affects every
a_k, so positions are fitted to the products, left to right (paper, calibration). In addition to the paper's
temperature a position may get a bias, because a temperature cannot correct a head that is overconfident on
both sides of 1/2. No torch here, so the scheduler image stays small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dspark_core.algorithms.calibration_error import (
    DEFAULT_BINS,
    Floats,
    area_under_roc,
    brier_score,
    expected_calibration_error,
    require_within,
)
from dspark_core.errors import ConfigError

Integers = NDArray[np.int64]

MAX_LOGIT = 20.0
"""Logit that stands for a confidence of exactly 0 or 1; float32 cannot tell it from a larger one."""

# Bounded: a very high temperature makes all estimates equal, which is well calibrated but useless.
_TEMPERATURES = tuple(1.02**step for step in sorted(range(-80, 81), key=abs))
_MAX_BIAS = 6.0
_BISECTIONS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionQuality:
    """How survival estimates at one draft position compare with what actually survived."""

    rounds: int
    """Rounds that proposed this position."""
    ece: float
    auc: float | None
    """None when every token survived, or none did."""
    brier: float


@dataclass(frozen=True, slots=True)
class ConfidenceScaling:
    """Maps confidence logits to probabilities: sigmoid(logit / temperature + bias), per position."""

    temperatures: tuple[float, ...]
    biases: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.temperatures:
            raise ConfigError("temperatures of a calibration must not be empty")
        if len(self.biases) != len(self.temperatures):
            raise ConfigError(
                f"biases must have one value for each of {len(self.temperatures)} temperatures, "
                f"got {len(self.biases)}"
            )
        for value in self.temperatures:
            if not (math.isfinite(value) and value > 0.0):
                raise ConfigError(f"temperatures must be positive numbers, got {value}")
        for value in self.biases:
            if not math.isfinite(value):
                raise ConfigError(f"biases must be finite numbers, got {value}")

    def confidences(self, logits: ArrayLike) -> Floats:
        """Confidence logits [..., block] -> probabilities [..., block]."""
        scaled = np.asarray(logits, dtype=np.float64) / np.asarray(self.temperatures)
        return sigmoid(scaled + np.asarray(self.biases))


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The scaling of a drafter's confidence head, and its effect on the calibration error.

    Every tuple has one value per draft position. Errors are those of survival, without (before) and
    with (after) the scaling.
    """

    scaling: ConfidenceScaling
    rounds: tuple[int, ...]
    """Rounds each position was fitted to."""
    ece_before: tuple[float, ...]
    ece_after: tuple[float, ...]

    def __post_init__(self) -> None:
        count = len(self.scaling.temperatures)
        for name in ("rounds", "ece_before", "ece_after"):
            values = getattr(self, name)
            if len(values) != count:
                raise ConfigError(
                    f"{name} must have one value for each of {count} temperatures, got {len(values)}"
                )

    def to_dict(self) -> dict[str, object]:
        """JSON-compatible; inverse of `from_dict`."""
        rows = {**asdict(self.scaling), **asdict(self)}
        del rows["scaling"]
        return {name: list(values) for name, values in rows.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Calibration:
        """Ignores unknown fields. Raises ConfigError naming an invalid one."""
        rounds = _numbers(data, "rounds")
        if not all(value.is_integer() and value >= 0 for value in rounds):
            raise ConfigError(f"rounds must be whole numbers, got {list(rounds)}")
        temperatures = _numbers(data, "temperatures")
        biases = _numbers(data, "biases") if "biases" in data else (0.0,) * len(temperatures)
        return cls(
            scaling=ConfidenceScaling(temperatures, biases),
            rounds=tuple(int(value) for value in rounds),
            ece_before=_numbers(data, "ece_before"),
            ece_after=_numbers(data, "ece_after"),
        )


def confidence_logits(confidences: ArrayLike) -> Floats:
    """Inverse of the sigmoid, elementwise, within [-MAX_LOGIT, MAX_LOGIT]; NaN stays NaN."""
    values = np.asarray(confidences, dtype=np.float64)
    known = values[~np.isnan(values)]
    require_within(known, "confidences")
    with np.errstate(divide="ignore"):
        logits: Floats = np.log(values) - np.log1p(-values)
    return np.clip(logits, -MAX_LOGIT, MAX_LOGIT)


def sigmoid(logits: ArrayLike) -> Floats:
    """Elementwise, in log-sum-exp form: no overflow, and small probabilities keep their precision."""
    return np.asarray(np.exp(-np.logaddexp(0.0, -np.asarray(logits, dtype=np.float64))), dtype=np.float64)


def fit_sequential_scaling(
    logits: ArrayLike,
    accepted: ArrayLike,
    proposed: ArrayLike,
    *,
    bins: int = DEFAULT_BINS,
    least_rounds: int = 1,
) -> ConfidenceScaling:
    """Per position, the temperature and bias that minimise the ECE of survival given earlier positions.

    Searches a grid of temperatures, each without a bias and with the bias that matches the mean
    survival. logits: confidence logits [rounds, block]; accepted and proposed: draft tokens
    [rounds]. Position k counts in rounds that proposed it, and survived if accepted >= k; logits
    beyond `proposed` are not read. `proposed` must not depend on the block's content (verify
    everything, as `FullPlanSource` does), or the fit is biased. A position that fewer than
    `least_rounds` proposed is left unscaled. Raises ValueError for mismatched shapes or values out of range.
    """
    values, lengths, limits = _rounds(logits, accepted, proposed)
    survival = np.ones(len(values))
    temperatures, biases = [], []
    for position in range(values.shape[1]):
        rows = limits > position
        if np.count_nonzero(rows) < least_rounds:
            temperatures.append(1.0)
            biases.append(0.0)
            continue  # nor are there more rounds at later positions
        column, before = values[rows, position], survival[rows]
        outcomes = (lengths[rows] > position).astype(np.float64)
        temperature, bias = _best_scaling(column, before, outcomes, bins)
        temperatures.append(temperature)
        biases.append(bias)
        survival[rows] = before * sigmoid(column / temperature + bias)
    return ConfidenceScaling(tuple(temperatures), tuple(biases))


def position_quality(
    logits: ArrayLike,
    accepted: ArrayLike,
    proposed: ArrayLike,
    scaling: ConfidenceScaling | None = None,
    *,
    bins: int = DEFAULT_BINS,
) -> tuple[PositionQuality, ...]:
    """Quality of survival with the given scaling (None: unscaled) by position; arguments as for the fit."""
    return tuple(
        PositionQuality(
            rounds=len(predicted),
            ece=expected_calibration_error(predicted, observed, bins),
            auc=area_under_roc(predicted, observed),
            brier=brier_score(predicted, observed),
        )
        for predicted, observed in survival_by_position(logits, accepted, proposed, scaling)
    )


def survival_by_position(
    logits: ArrayLike, accepted: ArrayLike, proposed: ArrayLike, scaling: ConfidenceScaling | None = None
) -> tuple[tuple[Floats, Floats], ...]:
    """Per position: estimates [n] and outcomes [n] over the n rounds that proposed it."""
    values, lengths, limits = _rounds(logits, accepted, proposed)
    block = values.shape[1]
    if scaling is not None and len(scaling.temperatures) != block:
        raise ValueError(
            f"temperatures must have one value for each of {block}, got {len(scaling.temperatures)}"
        )
    confidences = sigmoid(values) if scaling is None else scaling.confidences(values)
    survival = np.cumprod(confidences, axis=1)
    return tuple(
        (survival[limits > k, k], (lengths[limits > k] > k).astype(np.float64)) for k in range(block)
    )


def calibrate(
    logits: ArrayLike, accepted: ArrayLike, proposed: ArrayLike, *, bins: int = DEFAULT_BINS
) -> Calibration:
    """Fits the scaling and measures its improvement on the same rounds."""
    scaling = fit_sequential_scaling(logits, accepted, proposed, bins=bins)
    before = position_quality(logits, accepted, proposed, bins=bins)
    after = position_quality(logits, accepted, proposed, scaling, bins=bins)
    return Calibration(
        scaling=scaling,
        rounds=tuple(quality.rounds for quality in before),
        ece_before=tuple(quality.ece for quality in before),
        ece_after=tuple(quality.ece for quality in after),
    )


def _best_scaling(column: Floats, before: Floats, outcomes: Floats, bins: int) -> tuple[float, float]:
    """Among equally good candidates: no bias if possible, then the temperature nearest to 1.

    column: logits [n]; before: survival up to the previous position [n].
    """
    best, lowest = (1.0, 0.0), math.inf
    for candidate in _candidates(column, before, outcomes):
        temperature, bias = candidate
        survival = before * sigmoid(column / temperature + bias)
        error = expected_calibration_error(survival, outcomes, bins)
        if error < lowest:
            best, lowest = candidate, error
    return best


def _candidates(column: Floats, before: Floats, outcomes: Floats) -> Iterator[tuple[float, float]]:
    """Grid temperatures without a bias, then each with the bias that matches the mean."""
    yield from ((temperature, 0.0) for temperature in _TEMPERATURES)
    if len(column):
        for temperature in _TEMPERATURES:
            yield temperature, _mean_matching_bias(column / temperature, before, outcomes)


def _mean_matching_bias(scaled: Floats, before: Floats, outcomes: Floats) -> float:
    """The bias within [-_MAX_BIAS, _MAX_BIAS] whose mean survival is closest to the mean outcome."""
    wanted, low, high = float(outcomes.mean()), -_MAX_BIAS, _MAX_BIAS
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        # Spelled out: twice as fast as the stable form, and only the mean matters here.
        mean = float((before / (1.0 + np.exp(-np.clip(scaled + middle, -60.0, 60.0)))).mean())
        low, high = (middle, high) if mean < wanted else (low, middle)
    return (low + high) / 2


def _rounds(logits: ArrayLike, accepted: ArrayLike, proposed: ArrayLike) -> tuple[Floats, Integers, Integers]:
    """Validated arrays, with logits beyond `proposed` set to 0."""
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
