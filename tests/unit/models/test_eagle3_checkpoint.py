"""Eagle3 checkpoints: DeepSpec's load, and what does not fit is refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_core.engine.building import read_geometry
from dspark_core.errors import CheckpointError
from dspark_core.models.config import Family
from dspark_core.models.drafter_config import read_any_config, read_drafter_config, read_eagle3_config
from dspark_core.models.eagle3 import Eagle3Drafter
from dspark_core.models.eagle3_checkpoint import load_eagle3, load_eagle3_projection
from tests.unit.models.dspark_golden import GOLDEN, golden_target, run_target

TARGET = golden_target().config
EAGLE3 = GOLDEN / "eagle3"


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Eagle3Drafter:
    decoder = golden_target().decoder
    return load_eagle3(directory, decoder.embed_tokens.weight, decoder.lm_head.weight, TARGET, dtype)


def changed(
    directory: Path,
    fields: dict[str, Any] | None = None,
    tensors: Callable[[dict[str, torch.Tensor]], object] = lambda state: None,
) -> Path:
    """A copy of the golden checkpoint with other fields and tensors."""
    config = json.loads((EAGLE3 / "config.json").read_text()) | (fields or {})
    (directory / "config.json").write_text(json.dumps(config))
    state = load_file(EAGLE3 / "model.safetensors")
    tensors(state)
    save_file(state, directory / "model.safetensors")
    return directory


def test_the_configuration_is_what_deepspec_wrote() -> None:
    config = read_eagle3_config(EAGLE3)
    assert config == read_any_config(EAGLE3)
    assert (config.block_size, config.target_layer_ids, config.tap_size) == (7, (1, 2, 3, 4, 5), 320)
    assert config.backbone.num_layers == 1
    assert config.backbone.family is Family.QWEN3
    assert read_geometry(EAGLE3).block_size == 7
    assert read_geometry(EAGLE3).context_window is None


@torch.inference_mode()
def test_the_verifiers_projection_is_the_drafters() -> None:
    projection = load_eagle3_projection(EAGLE3, TARGET, torch.float32)
    taps = run_target([7, 8, 9], projection.target_layer_ids).taps
    weight = load_file(EAGLE3 / "model.safetensors")["fc.weight"]
    assert torch.allclose(projection(taps), taps @ weight.T, atol=1e-5)
    assert torch.equal(projection(taps), load(EAGLE3).projection(taps))


def test_embedding_and_head_come_from_the_target_where_the_file_has_none(tmp_path: Path) -> None:
    own = load(EAGLE3)
    frozen = ("embed_tokens.weight", "lm_head.weight")
    directory = changed(tmp_path, tensors=lambda state: [state.pop(name) for name in frozen])
    shared = load(directory)
    decoder = golden_target().decoder
    assert shared.embed_tokens.data_ptr() == decoder.embed_tokens.weight.data_ptr()
    assert shared.lm_head.data_ptr() == decoder.lm_head.weight.data_ptr()
    assert own.embed_tokens.data_ptr() != shared.embed_tokens.data_ptr()


def test_a_llama_layer_has_no_norms_of_queries_and_keys(tmp_path: Path) -> None:
    norms = ("layers.0.self_attn.q_norm.weight", "layers.0.self_attn.k_norm.weight")
    fields = {"architectures": ["LlamaEagle3Model"], "model_type": "llama"}
    with pytest.raises(CheckpointError, match=r"k_norm.weight: unexpected tensor"):
        load(changed(tmp_path, fields))
    drafter = load(changed(tmp_path, fields, lambda state: [state.pop(name) for name in norms]))
    assert drafter.config.backbone.family is Family.LLAMA
    assert not drafter.config.backbone.qk_norm


def test_the_fingerprint_follows_geometry_and_projection(tmp_path: Path) -> None:
    original = read_geometry(EAGLE3).fingerprint
    assert read_geometry(changed(tmp_path)).fingerprint == original
    other = read_geometry(changed(tmp_path, tensors=lambda state: state["norm.weight"].mul_(2)))
    assert other.fingerprint == original
    assert read_geometry(changed(tmp_path, {"ttt_length": 5})).fingerprint != original
    other = read_geometry(changed(tmp_path, tensors=lambda state: state["fc.weight"].mul_(2)))
    assert other.fingerprint != original


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ttt_length": None}, "ttt_length is missing"),
        ({"ttt_length": 0}, "ttt_length=0 must be a positive integer"),
        ({"num_hidden_layers": 2}, "num_hidden_layers=2 must be 1"),
        ({"target_layer_ids": [8]}, r"target_layer_ids=\[8\] must be in \[-1, num_target_layers=8\)"),
        ({"target_layer_ids": [1, 2]}, r"fc.weight: shape \[64, 320\], the configuration needs \[64, 128\]"),
        ({"num_target_layers": 9}, "num_target_layers=9 does not fit the target, which has 8"),
        ({"vocab_size": 500}, "vocab_size=500 does not fit the target, which has 512"),
        ({"architectures": ["Gemma5Eagle3Model"]}, "supported: .*'Qwen3Eagle3Model'"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path: Path, fields: dict, message: str) -> None:
    directory = changed(tmp_path, fields)
    with pytest.raises(CheckpointError, match=message):
        load(directory)


@pytest.mark.parametrize("name", ["fc.weight", "layers.0.hidden_norm.weight", "norm.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    directory = changed(tmp_path, tensors=lambda state: state.pop(name))
    with pytest.raises(CheckpointError, match=f"{name}: missing tensor"):
        load(directory)


def test_a_verifier_refuses_a_checkpoint_without_projection(tmp_path: Path) -> None:
    directory = changed(tmp_path, tensors=lambda state: state.pop("fc.weight"))
    with pytest.raises(CheckpointError, match=r"fc.weight: missing tensor"):
        load_eagle3_projection(directory, TARGET, torch.float32)
    with pytest.raises(CheckpointError, match=r"fc.weight: missing tensor"):
        read_geometry(directory)


def test_each_kind_of_drafter_is_refused_as_the_other() -> None:
    with pytest.raises(CheckpointError, match=r"Qwen3Eagle3Model.* is not a DSpark drafter"):
        read_drafter_config(EAGLE3)
    with pytest.raises(CheckpointError, match=r"Qwen3DSparkModel.* is not an Eagle3 drafter"):
        read_eagle3_config(GOLDEN / "dflash")


def test_bfloat16_weights_draft_in_bfloat16() -> None:
    drafter = load(EAGLE3, torch.bfloat16)
    assert {value.dtype for value in drafter.state_dict().values()} == {torch.bfloat16}
    assert dataclasses.astuple(drafter.config) == dataclasses.astuple(load(EAGLE3).config)
