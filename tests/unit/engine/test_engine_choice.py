"""The choice of engine: wrong choices are reported before anything is loaded."""

import importlib.util

import pytest

from dspark_core.engine import building
from dspark_core.engine.building import EngineOptions, build_drafter, build_target
from dspark_core.errors import ConfigError
from services.common.env import json_object
from tests.unit.models.dspark_golden import GOLDEN


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"engine": "tgi"}, "engine must be one of native, vllm, got 'tgi'"),
        (
            {"vllm_arguments": {"block_size": 32}},
            r"vllm arguments \(block_size\) need engine vllm, got 'native'",
        ),
        (
            {"engine": "vllm", "weights": "int8"},
            "engine vllm serves weights as they are stored, got weights 'int8'",
        ),
    ],
)
def test_a_wrong_choice_is_named(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineOptions(target_model="x", drafter=None, **given)


@pytest.mark.parametrize(("lookup", "longest"), [(False, None), (True, 15)])
def test_graphs_are_of_whatever_is_verified(monkeypatch, lookup: bool, longest: int | None) -> None:
    """Only the target verifies looked-up blocks, so only its graphs need room for them."""
    asked: list[tuple[int, int | None]] = []

    def settings(device, *, block_size, looked_up, graphs):
        asked.append((block_size, looked_up))

    monkeypatch.setattr(building, "gpu_settings", settings)
    target, drafter = str(GOLDEN / "qwen3_tiny_target"), str(GOLDEN / "dspark_vanilla")
    options = EngineOptions(target_model=target, drafter=drafter, kv_cache_bytes=2**22, lookup=lookup)
    built = build_target(options)
    build_drafter(options, built.loaded)
    block = built.geometry.block_size
    assert asked == [(block, longest), (block, None)]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_without_vllm_its_engine_says_what_is_missing() -> None:
    with pytest.raises(ConfigError, match="engine vllm needs the package vllm"):
        build_target(EngineOptions(target_model="x", drafter=None, engine="vllm"))


@pytest.mark.parametrize("text", ["{", "[1]", "tensor_parallel_size=2"])
def test_arguments_that_are_no_object_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--vllm-arguments must be a JSON object, got"):
        json_object("--vllm-arguments", text)
