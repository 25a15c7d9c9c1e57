"""Rounds that mix searching and rejection requests: the planner agrees with a literal form of its rule."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_core.algorithms.mixed_turns import take_turns
from dspark_core.algorithms.plan_batch import PlanBatch, rank
from dspark_core.algorithms.plan_search import search
from dspark_core.algorithms.prefix_scheduler import admit_while_rising
from dspark_core.algorithms.speed_floor import expected_tokens
from tests.unit.algorithms.planning_cases import CONFIDENCES, requests_of

SECONDS = st.lists(st.sampled_from([0.5, 1.0, 1.5, 2.0]) | st.floats(0.2, 3.0), min_size=1, max_size=20)


def by_the_rule(batch, seconds):
    """Algorithm 1, a search given its rejection tokens, Algorithm 1 from there, and the search again."""
    everyone = rank(batch)
    admitted = everyone.lengths(admit_while_rising(everyone, float(batch.requests), seconds))
    lengths = search(batch, seconds, admitted, batch.coupled)
    careful = everyone.beyond(np.where(batch.coupled, everyone.block, lengths))
    expected = float(expected_tokens(batch, lengths).sum())
    more = careful.lengths(admit_while_rising(careful, expected, seconds[int(lengths.sum()) :]))
    return search(batch, seconds, lengths + more, batch.coupled) if more.any() else lengths


@given(CONFIDENCES, SECONDS, st.data())
@settings(max_examples=300)
def test_turns_on_sums_are_the_turns_of_planners(confidences, seconds, data):
    coupled = [data.draw(st.booleans()) for _ in confidences]
    granted = st.sampled_from([0.0, 0.5, 2.0])
    requests = [
        replace(request, granted=data.draw(granted)) for request in requests_of(confidences, None, coupled)
    ]
    batch, table = PlanBatch.of(requests), np.array(seconds)
    made, ruled = take_turns(batch, table), by_the_rule(batch, table)
    if made.tolist() != ruled.tolist():  # equally good up to rounding
        rates = [
            expected_tokens(batch, lengths).sum() / table[int(lengths.sum())] for lengths in (made, ruled)
        ]
        np.testing.assert_allclose(rates[0], rates[1], rtol=1e-12)
