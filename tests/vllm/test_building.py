"""What vLLM is told at start, and what is refused then."""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dspark_core.engine.building import EngineOptions
from dspark_core.engine.target.batch import Run
from dspark_core.engine.target.target_engine import TargetEngine
from dspark_core.errors import ConfigError
from dspark_core.models.loading import read_target_facts
from tests.vllm.test_engine import options

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.filterwarnings("default")]

LONG = 40960


@pytest.fixture(scope="module")
def long_target(target_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a context that is longer than the cache."""
    directory = tmp_path_factory.mktemp("long") / "qwen3long"
    shutil.copytree(target_directory, directory)
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": LONG}))
    return directory


@contextmanager
def built(given: EngineOptions) -> Iterator[TargetEngine]:
    from dspark_core.vllm_engine.building import build_vllm_engine

    engine = build_vllm_engine(given, read_target_facts(given.target_model), None, None)
    try:
        yield engine
    finally:
        engine.close()


def test_graphs_compiled_for_other_layers_are_not_taken_from_vllms_cache(target_directory: Path) -> None:
    """They contain what the drafter is given, and vLLM finds them again by its configuration's hash."""
    from dspark_core.vllm_engine.building import configuration

    facts = read_target_facts(str(target_directory))
    given = options(target_directory, additional_config={"own": 1})
    found = {
        layers: configuration(given, facts, most_drafts=7, tap_layers=layers) for layers in [(), (0,), (0, 2)]
    }
    assert len({one.compute_hash() for one in found.values()}) == 3
    again = configuration(given, facts, most_drafts=7, tap_layers=(0, 2))
    assert again.compute_hash() == found[0, 2].compute_hash()
    assert again.additional_config["own"] == 1


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_the_device_may_be_named_if_it_is_vllms(name: str) -> None:
    from dspark_core.vllm_engine.building import check_device

    check_device(name, torch.device("cuda"))


@pytest.mark.parametrize("name", ["cpu", "cuda:1"])
def test_another_device_than_vllms_is_refused(name: str) -> None:
    from dspark_core.vllm_engine.building import check_device

    with pytest.raises(ConfigError, match=rf"computes on cuda, got device '{name}'.*CUDA_VISIBLE_DEVICES"):
        check_device(name, torch.device("cuda"))


def test_another_device_is_refused_before_anything_is_loaded(target_directory: Path) -> None:
    with (
        pytest.raises(ConfigError, match="engine vllm computes on cpu, got device 'cuda'"),
        built(replace(options(target_directory), device="cuda")),
    ):
        pass


def test_a_cache_smaller_than_a_context_shortens_it(
    long_target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "dspark_core"), built(options(long_target)) as engine:
        assert 512 <= engine.max_context_tokens < LONG
        assert engine.max_context_tokens == (engine.num_pages - 1) * engine.page_tokens
        assert engine.forward([Run([1, 2, 3], 0, [1], 1, "a")]).shape == (1, 192)
    (warning,) = (record.message for record in caplog.records if record.name.startswith("dspark_core"))
    assert f"the cache of qwen3long holds a context of {engine.max_context_tokens} tokens" in warning
    assert "--kv-cache-mb" in warning


def test_a_cache_that_does_not_hold_the_context_that_was_asked_for_is_refused(long_target: Path) -> None:
    given = replace(options(long_target), max_context_tokens=LONG)
    told = rf"--kv-cache-mb\) 64 for DSPARK_MAX_CONTEXT_TOKENS {LONG}: To serve"
    with pytest.raises(ConfigError, match=told), built(given):
        pass


def test_a_cache_that_hardly_holds_anything_is_refused(long_target: Path) -> None:
    given = replace(options(long_target), kv_cache_bytes=2**20)
    told = r"--kv-cache-mb\) must be >= 2 for 512 tokens of qwen3long, got 1"
    with pytest.raises(ConfigError, match=told), built(given):
        pass
