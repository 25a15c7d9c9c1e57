"""How a verifier comes by its step times at start."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from dspark_core.engine.building import BuiltTarget, EngineOptions
from dspark_core.engine.profiling import profiler
from dspark_core.engine.profiling.profile_file import read_profile
from dspark_core.engine.rounds.planning import LocalPlanSource
from dspark_core.errors import ConfigError
from dspark_core.records import ReplicaKind
from services.verifier import profiling, service
from services.verifier.metrics import VerifierMetrics
from services.verifier.profiling import ProfileOptions, profile_points, start_profile
from services.verifier.service import load_profiled_target
from tests.support.gpu_parts import CallAgain, plain_gpu
from tests.unit.engine.tiny import tiny_engine

KIND = ReplicaKind(model="tiny", engine="native", hardware="cpu", dtype="float32")


@pytest.fixture(autouse=True)
def _short(monkeypatch) -> None:
    monkeypatch.setattr(profiling, "START_SECONDS", 0.3)


def profiled_gauge(planner: LocalPlanSource) -> float | None:
    registry = CollectorRegistry()
    VerifierMetrics(registry).watch_planner(planner)
    return registry.get_sample_value("dspark_step_time_profiled")


def test_step_times_are_measured_by_default() -> None:
    measured = start_profile(tiny_engine(), KIND, ProfileOptions(max_requests=4))
    assert measured is not None
    assert max(point.requests for point in profile_points(measured)) <= 4
    assert profiled_gauge(LocalPlanSource(measured)) == 1.0


@pytest.mark.parametrize(
    ("max_requests", "max_batch_tokens", "requests", "tokens"), [(64, 512, 64, 512), (48, 100, 32, 64)]
)
def test_steps_are_measured_as_large_as_they_may_get(
    max_requests: int, max_batch_tokens: int, requests: int, tokens: int, monkeypatch
) -> None:
    monkeypatch.setattr(profiling, "START_SECONDS", 30.0)
    monkeypatch.setattr(profiler, "MIN_JUMP", 1e9)  # no search for stairs
    options = ProfileOptions(max_requests=max_requests, max_batch_tokens=max_batch_tokens)
    measured = start_profile(tiny_engine(), KIND, options)
    assert measured is not None
    assert max(point.requests for point in measured.verify.points) == requests
    assert max(point.batch_tokens for point in measured.verify.points) == tokens


@pytest.mark.parametrize(("lookup", "most"), [(False, 8), (True, 16)])
def test_steps_are_measured_as_far_as_drafts_go(lookup: bool, most: int) -> None:
    measured = start_profile(tiny_engine(), KIND, ProfileOptions(max_requests=2, lookup=lookup))
    assert measured is not None
    assert max(p.batch_tokens // p.requests for p in measured.verify.points) == most


def test_a_verifier_that_was_not_profiled_says_so(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        assert start_profile(tiny_engine(), KIND, ProfileOptions(source="off")) is None
    assert "not profiled" in caplog.text
    assert profile_points(None) == ()
    assert profiled_gauge(LocalPlanSource(None)) == 0.0


def test_a_file_is_written_once_and_read_while_it_fits(tmp_path, caplog) -> None:
    options = ProfileOptions(source=str(tmp_path / "steps.json"), max_requests=2)
    first = start_profile(tiny_engine(), KIND, options)
    again = start_profile(tiny_engine(), KIND, options)
    assert first == again == read_profile(tmp_path / "steps.json")
    with caplog.at_level(logging.WARNING):
        start_profile(tiny_engine(), replace(KIND, engine="int8 weights"), options)
    assert "int8 weights" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        other = start_profile(tiny_engine(), replace(KIND, model="another"), options)
    assert "measuring anew" in caplog.text
    assert other is not None
    assert read_profile(tmp_path / "steps.json").verify.key.model == "another"


def test_a_file_that_is_no_profile_stops_the_start(tmp_path) -> None:
    path = tmp_path / "steps.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"steps\.json is no profile"):
        start_profile(tiny_engine(), KIND, ProfileOptions(source=str(path)))


def test_steps_are_prepared_for_serving_even_where_nothing_is_measured(monkeypatch) -> None:
    recorder = CallAgain()
    gpu = plain_gpu(recorder)
    built = BuiltTarget(engine=tiny_engine(gpu=gpu), facts=None, geometry=None)  # type: ignore[arg-type]
    monkeypatch.setattr(service, "build_target", lambda options: built)
    monkeypatch.setattr(service, "served_weights", lambda options, facts: "")
    options = EngineOptions(target_model="tiny", drafter=None)
    load_profiled_target(options, ProfileOptions(source="off", max_requests=2))
    assert recorder.records == len(gpu.grid.holding(2)) < len(gpu.grid.all())
