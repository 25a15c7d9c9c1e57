"""Applies an online calibration to the survival of the requests to plan.

The scheduler does so before it computes a capacity, the verifier before it ranks a round's tokens. What the
same confidence is worth falls as the temperature of sampling rises, so there is one scaling per band of
temperatures.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from dspark_core.algorithms.calibration import MAX_LOGIT, ConfidenceScaling
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.errors import ConfigError
from dspark_core.records import DraftOrigin, ScalingBand

_MAX_EXPONENT = 700.0


@dataclass(frozen=True, slots=True)
class BandedScaling:
    """Scalings by sampling temperature."""

    bands: tuple[tuple[float, ConfidenceScaling | None], ...]
    """(highest temperature, scaling), by rising temperature; None: confidences stay as they are."""

    def at(self, temperature: float) -> ConfidenceScaling | None:
        for highest, scaling in self.bands:
            if temperature <= highest:
                return scaling
        return None


def banded(bands: Sequence[ScalingBand]) -> BandedScaling | None:
    """None if no band rescales; a band whose values are invalid does not."""
    found = tuple((band.up_to_temperature, _scaling_of(band)) for band in bands)
    return BandedScaling(found) if any(scaling for _, scaling in found) else None


def _scaling_of(band: ScalingBand) -> ConfidenceScaling | None:
    if not band.temperatures:
        return None
    try:
        return ConfidenceScaling(band.temperatures, band.biases)
    except ConfigError:
        return None


def scaled(requests: Sequence[PlanRequest], scaling: BandedScaling | None) -> Sequence[PlanRequest]:
    """Survival a_k = c_1 ... c_k with every c_k rescaled; positions beyond the scaling keep their c_k.

    The scaling was fitted to completed rounds, so verify lengths still do not depend on this round's tokens.
    """
    if scaling is None:
        return requests
    return [_rescaled(request, scaling) for request in requests]


def _rescaled(request: PlanRequest, scaling: BandedScaling) -> PlanRequest:
    band = scaling.at(request.temperature)
    if band is None or request.origin is not DraftOrigin.DRAFTER or not len(request.survival):
        return request
    return dataclasses.replace(request, survival=_scaled_row(request.survival, band))


def _scaled_row(survival: Sequence[float], scaling: ConfidenceScaling) -> tuple[float, ...]:
    # Plain floats: a round has a few hundred of them, and numpy's cost per short array would be higher.
    rescaled: list[float] = []
    before, product = 1.0, 1.0
    for position, value in enumerate(survival):
        confidence = min(value / before, 1.0) if before > 0.0 else 0.0
        if position < len(scaling.temperatures):
            logit = _logit(confidence) / scaling.temperatures[position] + scaling.biases[position]
            confidence = 1.0 / (1.0 + math.exp(-min(max(logit, -_MAX_EXPONENT), _MAX_EXPONENT)))
        product *= confidence
        rescaled.append(product)
        before = value
    return tuple(rescaled)


def _logit(confidence: float) -> float:
    if confidence <= 0.0 or confidence >= 1.0:
        return MAX_LOGIT if confidence >= 1.0 else -MAX_LOGIT
    return min(max(math.log(confidence / (1.0 - confidence)), -MAX_LOGIT), MAX_LOGIT)
