"""Applies an online calibration to the survival of the requests to plan.

The scheduler does so before it computes a capacity, the verifier before it ranks a round's tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from dspark_core.algorithms.calibration import MAX_LOGIT, ConfidenceScaling
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.records import DraftOrigin

_MAX_EXPONENT = 700.0


def scaled(requests: Sequence[PlanRequest], scaling: ConfidenceScaling | None) -> Sequence[PlanRequest]:
    """Survival a_k = c_1 ... c_k with every c_k rescaled; positions beyond the scaling keep their c_k.

    The scaling was fitted to completed rounds, so verify lengths still do not depend on this round's tokens.
    """
    if scaling is None:
        return requests
    return [
        dataclasses.replace(request, survival=_scaled_row(request.survival, scaling))
        if request.origin is DraftOrigin.DRAFTER and len(request.survival)
        else request
        for request in requests
    ]


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
