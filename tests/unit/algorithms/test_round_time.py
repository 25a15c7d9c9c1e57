"""What a round teaches the model of round times, and what the model says where nothing was measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.algorithms.round_time import MAX_SURPRISE, RATE, DraftTimeModel, RoundTimeModel
from dspark_core.algorithms.step_surface import StepPoint
from dspark_core.algorithms.step_time import MAX_POINTS, StepTimeModel
from dspark_core.records import DraftOrigin, RequestSurvival, RoundReport

MODEL = RoundTimeModel(
    StepTimeModel.of_curve((1, 5, 9), (0.010, 0.010, 0.018)), DraftTimeModel((1, 4), (0.004, 0.008)), 0.002
)
REPORT = RoundReport(
    replica_id="r",
    round=1,
    requests=(
        RequestSurvival(sequence_id="a", survival=(0.9, 0.8), verify_length=2, accepted=1),
        RequestSurvival(
            sequence_id="b", survival=(0.5,), verify_length=1, accepted=0, origin=DraftOrigin.LOOKUP
        ),
        RequestSurvival(sequence_id="c", survival=(), verify_length=0, accepted=0),
    ),
    batch_tokens=6,
    context_tokens=300,
    step_seconds=0.02,
    draft_seconds=0.012,
    draft_compute_seconds=0.006,
    loop_seconds=0.001,
)


def test_a_round_teaches_its_loop_its_drafting_and_its_step() -> None:
    expected = MODEL.observed_loop(3, 0.001).observed_draft(1, 0.012, 0.006).observed_step(3, 6, 300, 0.02)
    assert MODEL.learned(REPORT, typical=True) == expected
    unmeasured = replace(REPORT, draft_seconds=0.008, draft_compute_seconds=0.0)
    assert MODEL.learned(unmeasured, typical=True).draft == MODEL.draft.observed(1, 0.008 - 0.002)


def test_drafts_that_took_unusually_long_teach_nothing_about_drafting() -> None:
    learned = MODEL.learned(REPORT, typical=False)
    assert (learned.draft, learned.network_seconds) == (MODEL.draft, MODEL.network_seconds)
    assert learned.verify != MODEL.verify
    assert learned.loop != MODEL.loop


def test_a_step_with_a_prefill_chunk_teaches_nothing_about_steps() -> None:
    learned = MODEL.learned(replace(REPORT, batch_tokens=262), typical=True)
    assert learned.verify == MODEL.verify
    assert learned.draft != MODEL.draft


def test_a_round_without_requests_or_times_teaches_nothing() -> None:
    idle = replace(REPORT, requests=(), batch_tokens=0)
    untimed = replace(REPORT, step_seconds=0.0, draft_seconds=0.0, loop_seconds=0.0)
    assert MODEL.learned(idle, typical=True) == MODEL.learned(untimed, typical=True) == MODEL


@given(st.integers(1, 40))
def test_a_falling_curve_of_drafts_is_level_beyond_its_end(requests: int) -> None:
    noisy = DraftTimeModel((1, 2, 4), (0.004, 0.009, 0.007))
    assert noisy.seconds(requests) >= 0.004
    assert noisy.table(np.arange(1.0, requests + 1.0))[-1] == pytest.approx(noisy.seconds(requests))
    assert requests < 4 or noisy.seconds(requests) == 0.007


@pytest.mark.parametrize(("factor", "believed"), [(1.5, 1.5), (100.0, MAX_SURPRISE), (0.0, 1 / MAX_SURPRISE)])
def test_one_draft_moves_the_whole_curve_by_a_bounded_share(factor: float, believed: float) -> None:
    moved = MODEL.draft.observed(4, factor * 0.008)
    assert moved.draft_seconds == pytest.approx([0.004 * believed**RATE, 0.008 * believed**RATE])


def test_far_below_the_profiled_context_a_step_still_takes_a_quarter() -> None:
    points = [(1, 1, 10_000, 0.100), (1, 2, 10_000, 0.100), (1, 1, 20_000, 0.200)]
    model = StepTimeModel(tuple(StepPoint(*point) for point in points))
    assert model.seconds(1, 1, 20_000) == pytest.approx(0.200)
    assert model.seconds(1, 1, 0) == pytest.approx(0.025)
    assert model.table(1, [1, 2], 0).tolist() == pytest.approx([0.025, 0.025])


@given(
    st.lists(
        st.tuples(st.integers(1, 8), st.integers(1, 40), st.floats(1e-3, 1.0)),
        min_size=3,
        max_size=8,
        unique_by=lambda point: point[:2],
    )
)
def test_live_steps_of_ever_longer_contexts_are_all_points(steps: list[tuple[int, int, float]]) -> None:
    """No context is the usual one, so none is singled out as the reference."""
    points = [
        StepPoint(requests, tokens, 1000 * number * requests, seconds)
        for number, (requests, tokens, seconds) in enumerate(steps, start=1)
    ]
    model = StepTimeModel(tuple(points))
    for point in points:
        expected = pytest.approx(point.seconds)
        assert model.seconds(point.requests, point.batch_tokens, point.context_tokens) == expected


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=8, unique=True),
    st.integers(1, 64),
    st.integers(1, 100),
)
def test_a_step_is_put_down_to_points_in_whole(
    shapes: list[tuple[int, int]], requests: int, tokens: int
) -> None:
    model = StepTimeModel(tuple(StepPoint(*shape, 0, 0.01) for shape in shapes))
    shares = [share for _, share in model.surface.shares(requests, tokens)]
    assert min(shares) >= 0.0
    assert sum(shares) == pytest.approx(1.0)


def test_a_new_point_of_a_slower_machine_is_where_its_step_was() -> None:
    model = StepTimeModel.learn(1, 1, 0, 0.010)
    for _ in range(100):
        model = model.observed(1, 1, 0, 0.030)
    assert model.scale > 1.5
    wide = 1.2 * model.seconds(8, 8)
    model = model.observed(8, 8, 0, wide)
    assert len(model.points) == 2 < MAX_POINTS
    assert model.seconds(8, 8) == pytest.approx(wide)
