"""A change of the machine's speed is recognised from a few steps, but stalls are not mistaken for one."""

import random

import pytest

from dspark_core.algorithms.step_shift import NO_HISTORY, TakenStep
from dspark_core.algorithms.step_surface import StepPoint
from dspark_core.algorithms.step_time import StepTimeModel

FIXED, PER_TOKEN, REQUESTS = 0.020, 0.002, 4
COUNTS = (1, 2, 4, 8, 16)


def profiled_seconds(batch_tokens):
    return FIXED + PER_TOKEN * batch_tokens


def profile():
    points = [StepPoint(r, r * t, 128 * r, profiled_seconds(r * t)) for r in (1, 4, 8) for t in COUNTS]
    return StepTimeModel(tuple(points))


def of_clock(batch_tokens, factor):
    return factor * profiled_seconds(batch_tokens)


def of_cores(batch_tokens, factor):
    return profiled_seconds(REQUESTS) + factor * PER_TOKEN * (batch_tokens - REQUESTS)


def seen(model, taken, batches):
    for batch in batches:
        model = model.observed(REQUESTS, batch, 128 * REQUESTS, taken(batch))
    return model


def expected(model, batch):
    return model.seconds(REQUESTS, batch, 128 * REQUESTS)


@pytest.mark.parametrize("true", [of_clock, of_cores])
@pytest.mark.parametrize("factor", [4.0, 2.5])
def test_a_change_is_known_after_eight_steps(true, factor):
    model = seen(profile(), profiled_seconds, [16, 20, 12, 4] * 10)
    model = seen(model, lambda batch: true(batch, factor), [16, 20, 16, 4, 4, 4, 20, 12])
    for batch in (4, 8, 16, 32):
        assert expected(model, batch) == pytest.approx(true(batch, factor), rel=0.15)
    table = model.table(REQUESTS, range(REQUESTS, 40), 128 * REQUESTS)
    for batch in (4, 9, 39):
        assert table[batch - REQUESTS] == pytest.approx(expected(model, batch))


@pytest.mark.parametrize("true", [of_clock, of_cores])
def test_a_change_that_is_over_is_forgotten(true):
    model = seen(profile(), lambda batch: true(batch, 4.0), [16, 20, 16, 4, 4, 4, 20, 12])
    model = seen(model, profiled_seconds, [16, 4, 20, 4, 12, 4, 16, 8, 4, 16, 20, 4])
    for batch in (4, 16, 32):
        assert expected(model, batch) == pytest.approx(profiled_seconds(batch), rel=0.2)


def test_dear_tokens_that_are_not_verified_again_are_forgotten():
    model = seen(profile(), lambda batch: of_cores(batch, 4.0), [16, 20, 16, 4, 4, 4, 20, 12])
    dear = expected(model, 16)
    model = seen(model, profiled_seconds, [4] * 400)
    assert dear > 1.8 * profiled_seconds(16)
    assert expected(model, 16) == pytest.approx(profiled_seconds(16), rel=0.15)


def test_steps_that_all_hold_as_much_do_not_tell_what_changed():
    model = seen(profile(), profiled_seconds, [16, 20, 12, 4] * 10)
    assert not model.history.ambiguous
    model = seen(model, lambda batch: of_cores(batch, 4.0), [16, 20, 16, 16])
    assert model.history.ambiguous
    assert seen(model, lambda batch: of_cores(batch, 4.0), [4, 4]).history.ambiguous
    assert not seen(model, lambda batch: of_cores(batch, 4.0), [4, 4, 4]).history.ambiguous


@pytest.mark.parametrize("seed", range(20))
def test_stalls_and_noise_are_no_change(seed):
    """One step in sixteen takes five times as long; the others vary by a tenth."""
    source, model = random.Random(seed), profile()
    for _ in range(400):
        batch = source.choice([4, 4, 8, 12, 16, 20])
        stall = 5.0 if source.random() < 1 / 16 else 1.0
        model = model.observed(
            REQUESTS, batch, 512, stall * source.lognormvariate(0.0, 0.1) * profiled_seconds(batch)
        )
        assert model.token_factor == 1.0
    assert 0.8 < expected(model, 16) / profiled_seconds(16) < 1.8


def test_three_stalls_in_a_row_are_no_change():
    model = seen(profile(), profiled_seconds, [16, 20, 12, 4] * 10)
    stalled = seen(model, lambda batch: of_clock(batch, 8.0), [16, 20, 16])
    assert not stalled.history.changed
    for batch in (4, 16):
        assert expected(stalled, batch) < 1.4 * expected(model, batch)


def test_a_history_without_steps_tells_nothing():
    assert NO_HISTORY.shift() is None
    assert not NO_HISTORY.ambiguous
    one = NO_HISTORY.after(TakenStep(added=0.0, taken=4.0, surprise=1.4))
    assert one.shift() is None
