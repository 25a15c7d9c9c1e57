"""Refits confidences online from the outcomes at each draft position, pooled over all verifiers of a model
(paper, sequential temperature scaling).

Only served rounds are observed, and their verify lengths were chosen by the very confidences under test.
Estimates are conditional on those confidences, which leaves the fit nearly unbiased; a held-out half decides
whether it is used at all.
"""

from __future__ import annotations

import json
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark_core.algorithms.calibration import (
    ConfidenceScaling,
    confidence_logits,
    fit_sequential_scaling,
    position_quality,
)
from dspark_core.records import RequestSurvival
from services.scheduler.storage.documents import DocumentStore, SavedDocuments

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

WINDOW_ROUNDS = 4096
"""Outcomes kept per model, the newest; one outcome is one request in one round."""
MIN_ROUNDS = 512
"""New outcomes needed before a model is examined."""
MIN_GAIN = 0.005
"""A scaling is used if it lowers the error on held-out rounds by at least this."""
DRIFT_ERROR = 0.10
"""Above this error, confidences are reported as no longer fitting the traffic."""
MAX_MODELS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationState:
    """Result of the latest examination of a model's rounds."""

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


@dataclass(slots=True)
class _Window:
    rounds: deque[RequestSurvival]
    fresh: int = 0
    state: CalibrationState | None = None


class CalibrationBook:
    """Outcomes and results by model. Only results are stored: new outcomes arrive soon enough."""

    def __init__(self, store: DocumentStore) -> None:
        self._saved = SavedDocuments(store, "calibrations")
        self._windows: OrderedDict[str, _Window] = OrderedDict()

    def observe(self, model: str, requests: Sequence[RequestSurvival]) -> None:
        """Adds the outcomes of one round of a verifier that serves the model."""
        window = self._window(model)
        judged = [request for request in requests if request.verify_length and request.drafted]
        window.rounds.extend(judged)
        window.fresh += len(judged)

    def scaling(self, model: str) -> ConfidenceScaling | None:
        window = self._windows.get(model)
        return window.state.scaling if window and window.state else None

    def due(self) -> list[tuple[str, tuple[RequestSurvival, ...]]]:
        """Models with enough new outcomes since they were last due, with all their outcomes for `examine`."""
        found = []
        for model, window in self._windows.items():
            if window.fresh >= MIN_ROUNDS:
                window.fresh = 0
                found.append((model, tuple(window.rounds)))
        return found

    def learned(self, model: str, state: CalibrationState) -> None:
        if model in self._windows:
            self._windows[model].state = state

    def states(self) -> dict[str, CalibrationState]:
        return {model: window.state for model, window in self._windows.items() if window.state}

    async def load(self) -> None:
        """Takes over an earlier leader's results; leaves the book as it is if the store is down."""
        await self._saved.load(self._take)

    def _take(self, model: str, document: str) -> None:
        self._window(model).state = _state_from_text(document)

    def forget_saved(self) -> None:
        """Makes the next `save` write everything: the store may have lost its content."""
        self._saved.forget()

    async def save(self, term: int) -> None:
        """Stores what changed since the last call. Never fails."""
        await self._saved.save({model: _state_to_text(state) for model, state in self.states().items()}, term)

    async def close(self) -> None:
        await self._saved.close()

    def _window(self, model: str) -> _Window:
        window = self._windows.setdefault(model, _Window(deque(maxlen=WINDOW_ROUNDS)))
        self._windows.move_to_end(model)
        if len(self._windows) > MAX_MODELS:
            gone, _ = self._windows.popitem(last=False)
            self._saved.forget_one(gone)
        return window


def _state_to_text(state: CalibrationState) -> str:
    scaling = state.scaling and {"temperatures": state.scaling.temperatures, "biases": state.scaling.biases}
    return json.dumps({"error": state.error, "scaled_error": state.scaled_error, "scaling": scaling})


def _state_from_text(text: str) -> CalibrationState:
    """Raises ConfigError, ValueError, TypeError or KeyError for a malformed document."""
    document = json.loads(text)
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
    """Fits on every other outcome and evaluates on the rest. Takes a large part of a second."""
    block = max(len(request.survival) for request in requests)
    survival = np.zeros((len(requests), block))
    for row, request in enumerate(requests):
        survival[row, : len(request.survival)] = request.survival
    logits = confidence_logits(conditional_confidences(survival))
    accepted = np.array([request.accepted for request in requests])
    verified = np.array([min(r.verify_length, len(r.survival)) for r in requests])
    accepted = np.minimum(accepted, verified)
    fitted, judged = slice(0, None, 2), slice(1, None, 2)
    scaling = fit_sequential_scaling(logits[fitted], accepted[fitted], verified[fitted])
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
