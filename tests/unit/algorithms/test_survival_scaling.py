"""Online scalings of survival: by the definition, for the drafter's tokens, by temperature of sampling."""

from __future__ import annotations

from itertools import accumulate
from operator import mul

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.algorithms.calibration import ConfidenceScaling, confidence_logits
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.survival_scaling import banded, scaled
from dspark_core.records import DraftOrigin, ScalingBand

FOREVER = float("inf")


@given(
    st.lists(st.floats(0.01, 0.99), min_size=1, max_size=6),
    st.lists(st.tuples(st.floats(0.3, 3.0), st.floats(-2.0, 2.0)), min_size=1, max_size=6),
)
def test_each_confidence_is_rescaled_and_those_beyond_the_scaling_are_kept(
    confidences: list[float], positions: list[tuple[float, float]]
) -> None:
    temperatures, biases = zip(*positions, strict=True)
    scaling = banded([ScalingBand(up_to_temperature=FOREVER, temperatures=temperatures, biases=biases)])
    survival = tuple(accumulate(confidences, mul))
    (request,) = scaled([PlanRequest(survival=survival)], scaling)
    known = min(len(confidences), len(positions))
    logits = np.zeros(len(positions))
    logits[:known] = confidence_logits(confidences[:known])
    rescaled = ConfidenceScaling(temperatures, biases).confidences(logits)[:known].tolist()
    expected = list(accumulate([*rescaled, *confidences[known:]], mul))
    assert list(request.survival) == pytest.approx(expected)


def test_a_band_reaches_up_to_its_temperature_and_looked_up_tokens_are_left_alone() -> None:
    scaling = banded(
        [
            ScalingBand(up_to_temperature=0.0),
            ScalingBand(up_to_temperature=0.5, temperatures=(1.0,), biases=(-1.0,)),
            ScalingBand(up_to_temperature=FOREVER, temperatures=(1.0,), biases=(1.0,)),
        ]
    )
    drafted = [PlanRequest(survival=(0.5,), temperature=temperature) for temperature in (0.0, 0.5, 0.51)]
    looked_up = PlanRequest(survival=(0.5,), temperature=0.5, origin=DraftOrigin.LOOKUP)
    assert [one.survival[0] for one in scaled([*drafted, looked_up], scaling)] == pytest.approx(
        [0.5, 1 / (1 + np.e), 1 / (1 + 1 / np.e), 0.5]
    )
