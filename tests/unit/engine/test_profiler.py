"""Profiles of engines with known times: exact points, stairs found, budgets kept."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_core.algorithms.round_time import DraftTimeModel, RoundTimeModel
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.engine.building import EngineOptions
from dspark_core.engine.profiling.draft_profiler import NEW_FEATURES, profile_draft_time
from dspark_core.engine.profiling.profile_file import read_profile, replica_kind, write_profile
from dspark_core.engine.profiling.profiler import ProfileSettings, profile_step_time
from dspark_core.engine.target.batch import Run
from dspark_core.errors import ConfigError
from dspark_core.records import ReplicaKind
from tests.unit.engine.tiny import ScriptedDrafts, tiny_engine

KIND = ReplicaKind(model="tiny", engine="native", hardware="cpu", dtype="float32")


class Clocked:
    """An engine that takes time by a given function, and ten times as long for the first pass of a shape."""

    max_context_tokens = 4096
    page_tokens = 16
    num_pages = 100

    def __init__(self, law: Callable[[int, int, int], float]) -> None:
        self.law = law
        self.now = 0.0
        self.passes = 0
        self._seen: set[tuple[int, int, int]] = set()

    def clock(self) -> float:
        return self.now

    def prepare(self, requests: int) -> None:
        self.prepared = requests

    def forward(self, runs: Sequence[Run]) -> torch.Tensor:
        tokens = sum(len(run.token_ids) for run in runs)
        shape = (len(runs), tokens, sum(run.start for run in runs))
        for run in runs:
            assert len(run.pages) * self.page_tokens >= run.start + len(run.token_ids)
            assert all(0 < page < self.num_pages for page in run.pages)
        self.passes += 1
        self.now += self.law(*shape) * (1 if shape in self._seen else 10)
        self._seen.add(shape)
        return torch.zeros(tokens, 1)


def smooth(requests: int, tokens: int, context: int) -> float:
    return 0.010 + 0.0004 * tokens + 0.0007 * requests + 1e-7 * context


def stairs(requests: int, tokens: int, context: int) -> float:
    return 0.010 * math.ceil(tokens / 12) + 0.0001 * tokens


def profile(law: Callable[[int, int, int], float], **settings: object) -> tuple[StepTimeModel, Clocked]:
    engine = Clocked(law)
    chosen = replace(ProfileSettings(budget_seconds=30.0), **settings)  # type: ignore[arg-type]
    return profile_step_time(engine, chosen, clock=engine.clock), engine  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("requests", "tokens", "context"), [(1, 3, 128), (5, 17, 128), (32, 256, 500), (40, 90, 128)]
)
def test_step_time_is_known_between_and_beyond_the_measured_shapes(requests, tokens, context) -> None:
    model, _ = profile(smooth)
    expected = smooth(requests, tokens, context * requests)
    assert model.seconds(requests, tokens, context * requests) == pytest.approx(expected, rel=1e-3)


def test_stairs_are_pinned_to_a_token() -> None:
    model, _ = profile(stairs, requests=(1, 4), tokens_per_request=(1, 8))
    for edge in (12, 24):
        assert model.seconds(4, edge) == pytest.approx(stairs(4, edge, 0), rel=1e-3)
        assert model.seconds(4, edge + 1) == pytest.approx(stairs(4, edge + 1, 0), rel=1e-3)


def test_a_slope_is_not_searched_for_stairs() -> None:
    model, engine = profile(smooth, budget_seconds=1000.0)
    assert engine.now < 60.0
    assert len(model.points) < 120


@pytest.mark.parametrize("budget", [0.5, 2.0, 10.0])
def test_the_budget_bounds_the_time(budget) -> None:
    model, engine = profile(smooth, budget_seconds=budget)
    # It may be exceeded by at most the first pass of one shape.
    assert engine.now < budget + 11 * smooth(32, 256, 32 * 128)
    assert len(model.points) >= 3


def test_more_time_means_more_points() -> None:
    counts = [len(profile(stairs, budget_seconds=budget)[0].points) for budget in (0.5, 5.0, 50.0)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_quick_is_quick() -> None:
    engine = Clocked(smooth)
    profile_step_time(engine, ProfileSettings().quick(), clock=engine.clock)  # type: ignore[arg-type]
    assert engine.now < 4.0
    assert ProfileSettings(requests=(2, 3)).quick().requests == (2,)


def test_one_stall_does_not_bend_the_curve() -> None:
    calls = iter(range(10_000))

    def stalling(requests: int, tokens: int, context: int) -> float:
        return smooth(requests, tokens, context) * (50 if next(calls) == 77 else 1)

    model, _ = profile(stalling, budget_seconds=100.0)
    assert model.seconds(4, 16, 512) == pytest.approx(smooth(4, 16, 512), rel=0.01)


def test_a_real_engine_is_profiled_within_its_context() -> None:
    seen = []
    engine = tiny_engine(num_pages=12)  # 44 positions: fewer than the usual context
    settings = ProfileSettings(requests=(1, 2), repeats=2, budget_seconds=5.0)
    model = profile_step_time(
        engine,
        settings,
        key=ReplicaKind(model="tiny", engine="native", hardware="cpu", dtype="float32"),
        on_point=seen.append,
    )
    assert model.key == KIND
    assert len(seen) >= 8
    assert all(point.context_tokens + point.batch_tokens <= 44 * point.requests for point in model.points)
    assert model.seconds(2, 8) > 0


def test_looked_up_blocks_are_measured_as_far_as_they_go() -> None:
    """Step times are flat up to the largest regular point of one request, and steep beyond."""

    def bent(requests: int, tokens: int, context: int) -> float:
        return 0.010 + 0.002 * max(tokens - 8, 0)

    plain, _ = profile(bent, requests=(1,))
    assert plain.seconds(1, 16, 128) < 0.011
    model, _ = profile(bent, lookup_tokens=16)
    for requests in (1, 2, 4):
        expected = bent(requests, 16 * requests, 0)
        assert model.seconds(requests, 16 * requests, 128 * requests) == pytest.approx(expected, rel=1e-3)
    assert max(point.batch_tokens for point in model.points) == 32 * 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"requests": ()}, r"requests of a profile must be >= 1 and increasing, got \(\)"),
        ({"requests": (2, 1)}, "increasing"),
        ({"tokens_per_request": (0,)}, "tokens_per_request"),
        ({"lookup_tokens": 8}, "lookup_tokens of a profile must be > 8, got 8"),
        ({"repeats": 0}, "repeats of a profile must be >= 1, got 0"),
        ({"budget_seconds": 0.0}, "budget_seconds of a profile must be > 0, got 0.0"),
        ({"context_tokens": 2000}, "long_context_tokens"),
    ],
)
def test_impossible_settings_are_refused(fields, message) -> None:
    with pytest.raises(ConfigError, match=message):
        ProfileSettings(**fields)


def test_draft_time_is_measured_by_continued_drafts() -> None:
    source, now = ScriptedDrafts(), iter(range(10_000))
    model = profile_draft_time(
        source, tiny_engine(), (1, 2, 4), context_tokens=16, budget_seconds=1e6, clock=lambda: next(now)
    )
    assert model.requests == (1, 2, 4)
    assert model.draft_seconds == (1.0, 1.0, 1.0)
    assert {len(item.features) for item in source.items} == {16, NEW_FEATURES}
    assert len(source.released) == 7


def test_draft_counts_that_do_not_fit_are_left_out() -> None:
    now = iter(range(10_000))
    model = profile_draft_time(
        ScriptedDrafts(), tiny_engine(), (1, 2, 4), budget_seconds=15.0, clock=lambda: next(now)
    )
    assert model.requests == (1,)


def test_a_profile_survives_its_file(tmp_path) -> None:
    model = RoundTimeModel(profile(smooth)[0], DraftTimeModel((1, 4), (0.004, 0.006)))
    path = tmp_path / "deep" / "profile.json"
    write_profile(path, model)
    again = read_profile(path)
    assert again.draft == model.draft
    assert again.seconds(3, 9, 300, 2) == pytest.approx(model.seconds(3, 9, 300, 2))
    assert [entry.name for entry in path.parent.iterdir()] == ["profile.json"]


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cannot read"), ("[]", "JSON object"), ("{}", "is no profile")]
)
def test_a_file_that_is_no_profile_is_refused_by_name(tmp_path, text, message) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"(?s){message}.*|.*broken.json.*{message}"):
        read_profile(path)


def test_keys_name_model_hardware_dtype_weights_and_what_computes() -> None:
    engine = tiny_engine()
    options = EngineOptions(target_model="smollm2", drafter=None, dtype="bfloat16")
    key = replica_kind(options, engine)
    assert (key.model, key.dtype) == ("smollm2", "bfloat16")
    assert key.hardware
    assert engine.computed_by in key.engine
    assert key == replica_kind(options, engine)
    assert key != replica_kind(replace(options, weights="int8"), engine)


def busy(seed: int) -> Callable[[int, int, int], float]:
    """As measured on a shared machine: most steps take a tenth longer, one in three up to twice as long."""
    noise = random.Random(seed)

    def law(requests: int, tokens: int, context: int) -> float:
        return smooth(requests, tokens, context) * (1.0 + noise.choice([0.0, 0.1, 0.1 + noise.random()]))

    return law


@given(st.integers(0, 2**32))
@settings(max_examples=15)
def test_a_busy_machine_makes_no_larger_step_look_faster(seed: int) -> None:
    model, _ = profile(busy(seed), budget_seconds=6.0)
    for one in model.points:
        for more in model.points:
            holds_more = more.requests >= one.requests and more.batch_tokens >= one.batch_tokens
            if holds_more and more.context_tokens / more.requests >= one.context_tokens / one.requests:
                assert more.seconds >= one.seconds


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_what_decides_for_one_user_is_near_the_truth_on_a_busy_machine(seed: int) -> None:
    model, _ = profile(busy(seed), budget_seconds=6.0)
    for tokens in (1, 2, 4):
        assert 0.99 < model.seconds(1, tokens, 128) / smooth(1, tokens, 128) < 1.25


class Moody(Clocked):
    """Slows down repeatedly: for a while every step takes 1.5 times as long."""

    pace = 1.0

    def forward(self, runs: Sequence[Run]) -> torch.Tensor:
        before = self.now
        result = super().forward(runs)
        if math.sin(before * self.pace) > 0.3:
            self.now += 0.5 * (self.now - before)
        return result


@pytest.mark.parametrize("pace", [1.0, 2.0, 3.0])
def test_a_mood_of_the_machine_is_no_stair(pace: float) -> None:
    engine = Moody(smooth)
    engine.pace = pace
    model = profile_step_time(engine, ProfileSettings(budget_seconds=40.0), clock=engine.clock)  # type: ignore[arg-type]
    for requests in (1, 2, 4, 8, 16):
        context = 128 * requests
        base = model.seconds(requests, requests, context) / smooth(requests, requests, context)
        for tokens in range(requests, 8 * requests + 1, max(requests // 4, 1)):
            ratio = model.seconds(requests, tokens, context) / smooth(requests, tokens, context)
            assert ratio / base == pytest.approx(1.0, abs=0.05)
