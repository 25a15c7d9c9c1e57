"""Two verifiers serve the same weights if their files and their precision agree, and only then."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_core.engine.building import EngineOptions
from dspark_core.engine.served_weights import SAMPLE_BYTES, SAMPLES, served_weights
from dspark_core.errors import CheckpointError
from dspark_core.models.loading import TargetFacts, read_target_facts
from tests.unit.models.target_checkpoints import edit_json, llama, save_hf

WEIGHTS = "model.safetensors"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return save_hf(llama(), tmp_path / "target")


def mark(directory: Path, **options: object) -> str:
    settings = EngineOptions(target_model=str(directory), drafter=None, dtype="bfloat16")
    return served_weights(replace(settings, **options), read_target_facts(str(directory)))


def copy_of(directory: Path) -> Path:
    return Path(shutil.copytree(directory, directory.with_name("copy")))


def test_copies_agree_however_they_are_computed(target: Path) -> None:
    assert mark(copy_of(target)) == mark(target)
    assert mark(target, weights="full", native=False, max_context_tokens=32, device="cpu") == mark(target)
    vllm = {"engine": "vllm", "vllm_arguments": {"tensor_parallel_size": 2}}
    assert mark(target, **vllm) == mark(target)


def test_a_change_in_the_middle_of_a_matrix_shows(target: Path) -> None:
    """Which the start of every tensor, the target's fingerprint, does not."""
    other = copy_of(target)
    tensors = load_file(other / WEIGHTS)
    tensors["model.layers.1.mlp.down_proj.weight"][50, 50] += 1
    save_file(tensors, other / WEIGHTS, metadata={"format": "pt"})
    facts = [read_target_facts(str(one)).fingerprint for one in (target, other)]
    assert facts[0] == facts[1]
    assert mark(other) != mark(target)


def test_another_quantisation_of_the_same_model_shows(target: Path) -> None:
    edit_json(target / "config.json", quantization_config={"quant_method": "awq"})
    tensors = load_file(target / WEIGHTS)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = (100 * tensors[name]).to(torch.int8)
    save_file(tensors, target / WEIGHTS)
    other = copy_of(target)
    save_file(tensors | {name: -tensors[name]}, other / WEIGHTS)
    assert mark(other) != mark(target)


def test_tokenizer_and_precision_count(target: Path) -> None:
    other = copy_of(target)
    (other / "tokenizer.json").write_text("{}")
    assert mark(other) != mark(target)
    different = [
        {},
        {"dtype": "float32"},
        {"weights": "int8"},
        {"engine": "vllm", "vllm_arguments": {"quantization": "fp8"}},
    ]
    assert len({mark(target, **options) for options in different}) == len(different)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_large_checkpoint_is_sampled_to_its_end(shards: int, tmp_path: Path, target: Path) -> None:
    size = 64 * SAMPLES * SAMPLE_BYTES // shards  # sparse: takes no space
    files = [tmp_path / f"{number}.safetensors" for number in range(shards)]
    for file in files:
        with file.open("wb") as opened:
            opened.truncate(size)
    edit_json(new_file(tmp_path / "model.safetensors.index.json"), weight_map={f.stem: f.name for f in files})
    facts = replace(read_target_facts(str(target)), path=tmp_path)
    before = _mark_of(facts)
    with files[-1].open("r+b") as opened:
        opened.seek(size - 64 * SAMPLE_BYTES)
        opened.write(b"x" * 64 * SAMPLE_BYTES)
    assert _mark_of(facts) != before


def test_files_that_vanished_are_named(target: Path) -> None:
    facts = read_target_facts(str(target))
    (target / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="target: cannot be read"):
        _mark_of(facts)


def new_file(path: Path) -> Path:
    path.write_text("{}")
    return path


def _mark_of(facts: TargetFacts) -> str:
    return served_weights(EngineOptions(target_model="m", drafter=None), facts)
