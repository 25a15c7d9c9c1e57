"""Refits confidences online from the outcomes at each draft position, pooled over all verifiers of a model
(paper, sequential temperature scaling), for each band of sampling temperatures apart: the same confidence is
worth less the less predictable the target is made.

Only served rounds are observed, and their verify lengths were chosen by the very confidences under test.
Estimates are conditional on those confidences, which leaves the fit nearly unbiased; a held-out half decides
whether it is used at all.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dspark_core.algorithms.calibration import (
    ConfidenceScaling,
    confidence_logits,
    fit_sequential_scaling,
    position_quality,
)
from dspark_core.records import RequestSurvival, ScalingBand

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

MIN_ROUNDS = 512
"""New outcomes needed before they are examined."""
WINDOW_ROUNDS = 4096
"""Outcomes kept per model and band, the newest; one outcome is one request in one round."""
MEMORY_ROUNDS = 16 * WINDOW_ROUNDS
"""Outcomes of a verifier that gives no more are forgotten after this many of the others."""
RETRY_ROUNDS = 64 * MIN_ROUNDS
"""A scaling is dropped after this many request rounds without an outcome. If it was right, it is found again
from `MIN_ROUNDS` outcomes."""
MIN_POSITION_ROUNDS = 64
"""A draft position judged less often keeps the drafter's own confidence. Fitted to a few unlucky outcomes it
would seem hopeless, never be verified again, and so never be corrected."""
MIN_GAIN = 0.005
"""A scaling is used if it lowers the error on held-out rounds by at least this."""
DRIFT_ERROR = 0.10
"""Above this error, confidences are reported as no longer fitting the traffic."""
MAX_MODELS = 64
BANDS = {"0": 0.0, "0 to 0.5": 0.5, "above 0.5": math.inf}
"""Bands of sampling temperatures, rising: name -> highest temperature, inclusive."""


class Traffic(NamedTuple):
    """Requests whose confidences are examined together."""

    model: str
    band: str
    """Name of a band of sampling temperatures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationState:
    """Result of the latest examination of a model's rounds in one band."""

    error: float
    """Mean calibration error of survival over positions, with the drafter's own confidences, on held-out
    rounds."""
    scaled_error: float
    """The same with the scaling fitted to the other rounds."""
    scaling: ConfidenceScaling | None = None
    """None: no better than the drafter's own confidences."""

    @property
    def drifted(self) -> bool:
        return self.error > DRIFT_ERROR


class _Window:
    """The newest outcomes in one band, shared evenly between the verifiers they came from: a verifier whose
    outcomes are wrong must not decide for all others."""

    def __init__(self) -> None:
        self.fresh = 0
        self.unjudged = 0
        """Request rounds without an outcome since the latest examination."""
        self.state: CalibrationState | None = None
        self._outcomes: dict[str, deque[tuple[int, RequestSurvival]]] = {}
        """By verifier, each with its number in the order of arrival."""
        self._count = 0

    def add(self, replica_id: str, request: RequestSurvival) -> None:
        self._outcomes.setdefault(replica_id, deque()).append((self._count, request))
        self._count += 1
        self.fresh += 1
        if self._count % MIN_ROUNDS == 0:
            self._trim()

    def outcomes(self) -> tuple[RequestSurvival, ...]:
        self._trim()
        return tuple(request for those in self._outcomes.values() for _, request in those)

    def _trim(self) -> None:
        share = _even_share([len(those) for those in self._outcomes.values()], WINDOW_ROUNDS)
        for replica_id, those in list(self._outcomes.items()):
            while those and (len(those) > share or those[0][0] < self._count - MEMORY_ROUNDS):
                those.popleft()
            if not those:
                del self._outcomes[replica_id]


def _even_share(sizes: Sequence[int], most: int) -> int:
    """The largest size to cut `sizes` down to so that they sum to `most` at most; at least 1."""
    for index, size in enumerate(sorted(sizes)):
        share = most // (len(sizes) - index)
        if size > share:
            return max(share, 1)
        most -= size
    return max(sizes, default=1)


class CalibrationBook:
    """Outcomes and results by model and band. Only results are in its documents: new outcomes arrive soon
    enough."""

    def __init__(self) -> None:
        self._models: OrderedDict[str, dict[str, _Window]] = OrderedDict()

    def observe(self, model: str, replica_id: str, requests: Sequence[RequestSurvival]) -> None:
        """Adds the outcomes of one round of a verifier that serves the model."""
        windows = self._windows(model)
        for request in requests:
            window = windows[_band_of(request.temperature)]
            if request.verify_length and request.drafted:
                window.add(replica_id, request)
            else:
                window.unjudged += 1

    def scalings(self, model: str) -> tuple[ScalingBand, ...]:
        """What verifiers of the model are sent; empty if no band needs a scaling."""
        states = {name: window.state for name, window in self._models.get(model, {}).items()}
        if not any(state and state.scaling for state in states.values()):
            return ()
        return tuple(_scaling_band(BANDS[name], state) for name, state in states.items())

    def due(self) -> list[tuple[Traffic, tuple[RequestSurvival, ...]]]:
        """Traffic with enough new outcomes since it was last due, with all its outcomes for `examine`."""
        found = []
        for model, windows in self._models.items():
            for band, window in windows.items():
                if window.fresh >= MIN_ROUNDS:
                    window.fresh = 0
                    found.append((Traffic(model, band), window.outcomes()))
        return found

    def learned(self, traffic: Traffic, state: CalibrationState) -> None:
        if traffic.model in self._models:
            window = self._models[traffic.model][traffic.band]
            window.state, window.unjudged = state, 0

    def outlived(self) -> dict[Traffic, CalibrationState]:
        """Drops scalings under which hardly anything is verified any more, for nothing would correct a wrong
        one. Returns the new states."""
        found = {}
        for traffic, state in self.states().items():
            window = self._models[traffic.model][traffic.band]
            if state.scaling is not None and window.unjudged >= RETRY_ROUNDS:
                found[traffic] = replace(state, scaled_error=state.error, scaling=None)
                self.learned(traffic, found[traffic])
        return found

    def states(self) -> dict[Traffic, CalibrationState]:
        return {
            Traffic(model, band): window.state
            for model, windows in self._models.items()
            for band, window in windows.items()
            if window.state
        }

    def documents(self) -> dict[str, str]:
        """The newest results of each model."""
        by_model: dict[str, dict[str, CalibrationState]] = {}
        for traffic, state in self.states().items():
            by_model.setdefault(traffic.model, {})[traffic.band] = state
        return {model: _states_to_text(states) for model, states in by_model.items()}

    def take(self, model: str, document: str) -> None:
        """Takes over an earlier leader's results. Raises ConfigError, ValueError, TypeError or KeyError for a
        malformed document."""
        states = _states_from_text(document)
        windows = self._windows(model)
        for band, state in states.items():
            windows[band].state = state

    def _windows(self, model: str) -> dict[str, _Window]:
        windows = self._models.setdefault(model, {name: _Window() for name in BANDS})
        self._models.move_to_end(model)
        if len(self._models) > MAX_MODELS:
            self._models.popitem(last=False)
        return windows


def _band_of(temperature: float) -> str:
    return next(name for name, highest in BANDS.items() if temperature <= highest)


def _scaling_band(highest: float, state: CalibrationState | None) -> ScalingBand:
    scaling = state.scaling if state else None
    return ScalingBand(
        up_to_temperature=highest,
        temperatures=scaling.temperatures if scaling else (),
        biases=scaling.biases if scaling else (),
    )


def _states_to_text(states: Mapping[str, CalibrationState]) -> str:
    return json.dumps({band: _state_to_document(state) for band, state in states.items()})


def _state_to_document(state: CalibrationState) -> dict[str, object]:
    scaling = state.scaling and {"temperatures": state.scaling.temperatures, "biases": state.scaling.biases}
    return {"error": state.error, "scaled_error": state.scaled_error, "scaling": scaling}


def _states_from_text(text: str) -> dict[str, CalibrationState]:
    """Raises ConfigError, ValueError, TypeError or KeyError for a malformed document. Bands that this version
    does not have are left out."""
    document = json.loads(text)
    if not isinstance(document, dict):
        raise TypeError(f"a calibration must be an object, got {text[:40]}")
    return {band: _state_from_document(document[band]) for band in BANDS if band in document}


def _state_from_document(document: Mapping[str, Any]) -> CalibrationState:
    scaling = document["scaling"]
    return CalibrationState(
        error=float(document["error"]),
        scaled_error=float(document["scaled_error"]),
        scaling=scaling
        and ConfidenceScaling(
            tuple(float(value) for value in scaling["temperatures"]),
            tuple(float(value) for value in scaling["biases"]),
        ),
    )


def examine(requests: Sequence[RequestSurvival]) -> CalibrationState:
    """Fits on every other outcome and evaluates on the rest. Takes a large part of a second. Positions beyond
    the last that was judged often enough are left out, so the longest block does not decide its cost."""
    verified = np.array([min(r.verify_length, len(r.survival)) for r in requests])
    judged_often = np.sort(verified)[-min(MIN_POSITION_ROUNDS, len(verified))]
    block = max(int(judged_often), 1)
    survival = np.zeros((len(requests), block))
    for row, request in enumerate(requests):
        survival[row, : len(request.survival)] = request.survival[:block]
    logits = confidence_logits(conditional_confidences(survival))
    verified = np.minimum(verified, block)
    accepted = np.minimum([request.accepted for request in requests], verified)
    fitted, judged = slice(0, None, 2), slice(1, None, 2)
    scaling = fit_sequential_scaling(
        logits[fitted], accepted[fitted], verified[fitted], least_rounds=MIN_POSITION_ROUNDS
    )
    held_out = (logits[judged], accepted[judged], verified[judged])
    error, scaled_error = _error(*held_out, None), _error(*held_out, scaling)
    better = error - scaled_error >= MIN_GAIN
    return CalibrationState(error=error, scaled_error=scaled_error, scaling=scaling if better else None)


def conditional_confidences(survival: Floats) -> Floats:
    """Survival a_k [requests, block] -> confidences c_k = a_k / a_(k-1), 0 where a_(k-1) is 0."""
    before = np.concatenate((np.ones((len(survival), 1)), survival[:, :-1]), axis=1)
    quotient = np.divide(survival, before, out=np.zeros_like(survival), where=before > 0.0)
    confidences: Floats = np.clip(quotient, 0.0, 1.0)
    return confidences


def _error(
    logits: Floats, accepted: Integers, verified: Integers, scaling: ConfidenceScaling | None
) -> float:
    """Mean calibration error over positions, weighted by their numbers of rounds."""
    quality = position_quality(logits, accepted, verified, scaling)
    rounds = sum(position.rounds for position in quality)
    return sum(position.ece * position.rounds for position in quality) / rounds if rounds else 0.0
