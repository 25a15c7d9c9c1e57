"""Eagle3 and MTP-1 checkpoints of ours: what is saved is loaded, what does not fit is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_core.engine.building import read_geometry
from dspark_core.errors import CheckpointError
from dspark_core.models.config import AutoregressiveConfig
from dspark_core.models.drafter_config import read_any_config
from dspark_core.models.drafter_kinds import AnyDrafter, load_any_drafter, load_any_projection
from dspark_core.models.mtp_checkpoint import load_mtp
from tests.unit.models.autoregressive_tiny import EAGLE3, MTP, TARGET, random_drafter, save
from tests.unit.models.dspark_golden import GOLDEN, golden_target, run_target

KINDS = pytest.mark.parametrize("config", [EAGLE3, MTP], ids=["eagle3", "mtp1"])
SUBSET = torch.arange(0, 512, 3)


def load(directory: Path, dtype: torch.dtype = torch.float32) -> AnyDrafter:
    return load_any_drafter(directory, golden_target().decoder, TARGET, dtype)


def changed(
    directory: Path,
    fields: dict[str, Any],
    tensors: Callable[[dict[str, torch.Tensor]], object] = lambda state: None,
    ids: torch.Tensor | None = None,
) -> Path:
    """An MTP-1 checkpoint with other fields and tensors."""
    save(directory, random_drafter(MTP, ids))
    config = json.loads((directory / "config.json").read_text()) | fields
    (directory / "config.json").write_text(json.dumps(config))
    state = load_file(directory / "model.safetensors")
    tensors(state)
    save_file(state, directory / "model.safetensors")
    return directory


@KINDS
@pytest.mark.parametrize("ids", [None, SUBSET], ids=["full", "reduced"])
def test_what_is_saved_is_loaded(
    tmp_path: Path, config: AutoregressiveConfig, ids: torch.Tensor | None
) -> None:
    drafter = random_drafter(config, ids)
    loaded = load(save(tmp_path, drafter))
    assert loaded.config == drafter.config == read_any_config(tmp_path)
    state = drafter.state_dict()
    assert set(state) == set(loaded.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(loaded.lm_head, drafter.lm_head)


@KINDS
def test_with_target_weights_the_file_stands_alone(tmp_path: Path, config: AutoregressiveConfig) -> None:
    drafter = random_drafter(config, SUBSET)
    drafter.lm_head = drafter.lm_head * 2
    loaded = load(save(tmp_path, drafter, with_target_weights=True))
    assert torch.equal(loaded.lm_head, drafter.lm_head)


def test_eagle3_writes_the_vocabulary_maps_of_eagle3(tmp_path: Path) -> None:
    state = load_file(save(tmp_path, random_drafter(EAGLE3, SUBSET)) / "model.safetensors")
    assert torch.equal(torch.arange(len(SUBSET)) + state["d2t"], SUBSET)
    assert torch.equal(state["t2d"].nonzero().flatten(), SUBSET)


@KINDS
@torch.inference_mode()
def test_the_verifiers_projection_is_the_drafters(tmp_path: Path, config: AutoregressiveConfig) -> None:
    drafter = random_drafter(config)
    projection = load_any_projection(save(tmp_path, drafter), TARGET, torch.float32)
    taps = run_target([7, 8, 9], projection.target_layer_ids).taps
    assert torch.equal(projection(taps), drafter.projection(taps))


def test_mtp_reads_the_final_hidden_state_and_drafts_one_token(tmp_path: Path) -> None:
    geometry = read_geometry(save(tmp_path, random_drafter(MTP)))
    assert (geometry.block_size, geometry.feature_size, geometry.context_window) == (1, 64, None)
    assert json.loads((tmp_path / "config.json").read_text())["target_layer_ids"] == [8]


def test_the_fingerprint_follows_the_projection(tmp_path: Path) -> None:
    original = read_geometry(changed(tmp_path, {})).fingerprint
    other = changed(tmp_path, {}, lambda state: state["eh_proj.weight"].mul_(2))
    assert read_geometry(other).fingerprint == original
    other = changed(tmp_path, {}, lambda state: state["hnorm.weight"].mul_(2))
    assert read_geometry(other).fingerprint != original


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers=2 must be 1 in an MTP drafter"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers=2 must be 1"),
        ({"target_layer_ids": [7]}, r"target_layer_ids=\[7\] must be \[8\], the target's final hidden state"),
        ({"num_target_layers": 9, "target_layer_ids": [9]}, "num_target_layers=9 does not fit the target"),
        ({"draft_vocab_size": 513}, "draft_vocab_size=513 must be at most vocab_size=512"),
        ({"draft_vocab_size": 9}, "draft_vocab_ids: missing tensor"),
        ({"architectures": ["Gemma5MTPModel"]}, "supported: .*'Qwen3MTPModel'"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path: Path, fields: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(changed(tmp_path, fields))


@pytest.mark.parametrize("name", ["eh_proj.weight", "enorm.weight", "layers.0.mlp.up_proj.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name}: missing tensor"):
        load(changed(tmp_path, {}, lambda state: state.pop(name)))


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    narrow = {"eh_proj.weight": torch.zeros(64, 64)}
    with pytest.raises(CheckpointError, match=r"eh_proj.weight: shape \[64, 64\], .* needs \[64, 128\]"):
        load(changed(tmp_path, {}, lambda state: state.update(narrow)))


@pytest.mark.parametrize(
    ("ids", "message"),
    [([1, 1, 2], "ids must not repeat"), ([1, 2, 512], r"ids must be in \[0, vocab_size=512\)")],
)
def test_a_vocabulary_map_of_no_use_is_refused(tmp_path: Path, ids: list[int], message: str) -> None:
    other = {"draft_vocab_ids": torch.tensor(ids, dtype=torch.int32)}
    with pytest.raises(CheckpointError, match=message):
        load(changed(tmp_path, {}, lambda state: state.update(other), torch.tensor([1, 2, 3])))


def test_each_kind_is_refused_as_another() -> None:
    decoder = golden_target().decoder
    with pytest.raises(CheckpointError, match=r"Qwen3Eagle3Model.* is not an MTP drafter"):
        load_mtp(
            GOLDEN / "eagle3", decoder.embed_tokens.weight, decoder.lm_head.weight, TARGET, torch.float32
        )
