"""Drafter checkpoints: what is written can be read, and what does not fit is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspark_core.errors import CheckpointError, ConfigError
from dspark_core.models.config import DrafterConfig, Family, MarkovHeadType
from dspark_core.models.drafter_checkpoint import (
    fingerprint,
    load_drafter,
    load_projection,
    save_drafter,
)
from dspark_core.models.drafter_config import read_drafter_config
from dspark_core.models.dspark import DSparkDrafter
from dspark_core.models.rope_scaling import LinearScaling, RopeScaling, YarnScaling
from dspark_core.zoo_paths import resolve_drafter_path, shipped_drafters
from tests.unit.models.dspark_tiny import BACKBONE, TARGET, tiny_config, tiny_drafter

CONFIGS = {
    "vanilla": tiny_config(),
    "gated": tiny_config(markov_head_type=MarkovHeadType.GATED),
    "rnn": tiny_config(markov_head_type=MarkovHeadType.RNN),
    "dflash": tiny_config(markov_rank=0, confidence_head=False, confidence_head_with_markov=False),
    "window": tiny_config(context_window=8, confidence_head_with_markov=False),
    "reduced": tiny_config(draft_vocab_size=6),
    "qwen3": tiny_config(
        backbone=dataclasses.replace(
            BACKBONE,
            family=Family.QWEN3,
            qk_norm=True,
            rope_scaling=RopeScaling(
                factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32
            ),
        )
    ),
    "linear": tiny_config(
        backbone=dataclasses.replace(
            BACKBONE, rope_scaling=LinearScaling(factor=4.0, original_max_positions=16)
        )
    ),
    "yarn": tiny_config(
        backbone=dataclasses.replace(
            BACKBONE,
            rope_scaling=YarnScaling(
                factor=2.0,
                original_max_positions=32,
                attention_factor=1.1,
                beta_fast=16.0,
                beta_slow=2.0,
                truncate=False,
            ),
        )
    ),
}


def _drafter(config: DrafterConfig) -> DSparkDrafter:
    ids = None if config.draft_vocab_size is None else torch.arange(config.draft_vocab_size) * 3
    return tiny_drafter(config, ids)


def _full_head(config: DrafterConfig) -> Tensor:
    return tiny_drafter(dataclasses.replace(config, draft_vocab_size=None)).lm_head


def _load(directory: Path, drafter: DSparkDrafter, dtype: torch.dtype = torch.float32) -> DSparkDrafter:
    return load_drafter(directory, drafter.embed_tokens, _full_head(drafter.config), TARGET, dtype)


@pytest.mark.parametrize("with_target_weights", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_written_checkpoint_reads_back(name: str, with_target_weights: bool, tmp_path: Path) -> None:
    drafter = _drafter(CONFIGS[name])
    save_drafter(tmp_path, drafter, with_target_weights=with_target_weights)
    loaded = _load(tmp_path, drafter)
    assert loaded.config == drafter.config
    for key, value in drafter.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value)
    torch.testing.assert_close(loaded.embed_tokens, drafter.embed_tokens)
    torch.testing.assert_close(loaded.lm_head, drafter.lm_head)
    torch.testing.assert_close(loaded.rotary.cos, drafter.rotary.cos)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_targets_embedding_is_shared_not_copied(tmp_path: Path) -> None:
    drafter = _drafter(CONFIGS["vanilla"])
    save_drafter(tmp_path, drafter)
    loaded = load_drafter(tmp_path, drafter.embed_tokens, drafter.lm_head, TARGET, torch.float32)
    assert loaded.embed_tokens.data_ptr() == drafter.embed_tokens.data_ptr()
    assert loaded.lm_head.data_ptr() == drafter.lm_head.data_ptr()


def test_bfloat16_leaves_the_rotary_tables_and_the_vocabulary_exact(tmp_path: Path) -> None:
    drafter = _drafter(CONFIGS["reduced"])
    save_drafter(tmp_path, drafter)
    loaded = _load(tmp_path, drafter, torch.bfloat16)
    assert loaded.norm.weight.dtype is loaded.lm_head.dtype is loaded.embed_tokens.dtype is torch.bfloat16
    assert loaded.rotary.cos.dtype is torch.float32
    assert loaded.draft_vocab_ids is not None
    assert loaded.draft_vocab_ids.tolist() == [0, 3, 6, 9, 12, 15]


def test_a_gate_without_bias_is_read_as_zero(tmp_path: Path) -> None:
    drafter = _drafter(CONFIGS["gated"])
    save_drafter(tmp_path, drafter)
    _edit_tensors(tmp_path, {"markov_head.gate_proj.bias": None})
    loaded = _load(tmp_path, drafter)
    assert loaded.state_dict()["markov_head.gate_proj.bias"].tolist() == [0.0] * 3


def test_the_projection_alone_equals_the_drafters(tmp_path: Path) -> None:
    drafter = _drafter(CONFIGS["vanilla"])
    save_drafter(tmp_path, drafter)
    projection = load_projection(tmp_path, TARGET, torch.float32)
    taps = torch.randn(4, drafter.config.tap_size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(projection(taps), drafter.project(taps))
    assert projection.target_layer_ids == (-1, 2)


def test_the_fingerprint_follows_geometry_and_projection_only(tmp_path: Path) -> None:
    def written(name: str, drafter: DSparkDrafter) -> str:
        save_drafter(tmp_path / name, drafter)
        return fingerprint(tmp_path / name)

    base = written("base", tiny_drafter(tiny_config()))
    assert written("again", tiny_drafter(tiny_config())) == base
    assert written("window", tiny_drafter(tiny_config(context_window=8))) != base
    other_head, other_projection = tiny_drafter(tiny_config()), tiny_drafter(tiny_config())
    other_head.norm.weight.mul_(2)
    other_projection.projection.fc.weight[0, 0] += 1
    assert written("head", other_head) == base
    assert written("projection", other_projection) != base


def _edit_config(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _edit_tensors(directory: Path, changes: dict[str, Tensor | None]) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, path)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"vocab_size": 60}, ["config.json", "vocab_size=60", "50"]),
        ({"hidden_size": 32}, ["config.json", "hidden_size=32", "16"]),
        ({"num_target_layers": 5}, ["config.json", "num_target_layers=5", "4"]),
        ({"target_layer_ids": [4]}, ["target_layer_ids=[4]", "4"]),
        ({"target_layer_ids": []}, ["target_layer_ids=[]"]),
        ({"mask_token_id": 50}, ["mask_token_id=50", "50"]),
        ({"mask_token_id": None}, ["mask_token_id"]),
        ({"block_size": 0}, ["block_size=0"]),
        ({"markov_rank": -1}, ["markov_rank=-1"]),
        ({"markov_rank": 0}, ["confidence_head_with_markov", "markov_rank"]),
        ({"markov_head_type": "lstm"}, ["markov_head_type='lstm'", "vanilla"]),
        ({"draft_vocab_size": 51}, ["draft_vocab_size=51", "50"]),
        ({"architectures": ["Qwen3ForCausalLM"]}, ["architectures", "LlamaDSparkModel"]),
    ],
)
def test_a_wrong_field_is_named_with_its_value(
    fields: dict[str, object], told: list[str], tmp_path: Path
) -> None:
    drafter = _drafter(CONFIGS["vanilla"])
    save_drafter(tmp_path, drafter)
    _edit_config(tmp_path, **fields)
    with pytest.raises(CheckpointError) as error:
        _load(tmp_path, drafter)
    assert all(part in str(error.value) for part in told), str(error.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"norm.weight": None}, ["model.safetensors", "norm.weight", "[16]"]),
        ({"fc.weight": torch.zeros(16, 16)}, ["fc.weight", "[16, 16]", "[16, 32]"]),
        ({"embed_tokens.weight": torch.zeros(60, 16)}, ["embed_tokens.weight", "[60, 16]", "[50, 16]"]),
        ({"layers.2.mlp.up_proj.weight": torch.zeros(24, 16)}, ["layers.2.mlp.up_proj.weight", "unexpected"]),
        ({"norm.weight": torch.zeros(16, dtype=torch.int64)}, ["norm.weight", "int64"]),
        ({"norm.weight": torch.tensor([1.0] * 15 + [torch.nan])}, ["norm.weight", "infinite or no numbers"]),
        ({"draft_vocab_ids": torch.arange(6) + 45}, ["draft_vocab_ids", "50"]),
        ({"draft_vocab_ids": torch.zeros(6, dtype=torch.int32)}, ["draft_vocab_ids", "repeat"]),
        ({"draft_vocab_ids": torch.zeros(6)}, ["draft_vocab_ids", "float32"]),
        ({"draft_vocab_ids": torch.arange(7)}, ["draft_vocab_ids", "[7]", "[6]"]),
    ],
)
def test_a_wrong_tensor_is_named_with_both_shapes(
    changes: dict[str, Tensor | None], told: list[str], tmp_path: Path
) -> None:
    drafter = _drafter(CONFIGS["reduced"])
    save_drafter(tmp_path, drafter)
    _edit_tensors(tmp_path, changes)
    with pytest.raises(CheckpointError) as error:
        _load(tmp_path, drafter)
    assert all(part in str(error.value) for part in told), str(error.value)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    drafter = _drafter(CONFIGS["vanilla"])
    with pytest.raises(CheckpointError, match=r"config\.json"):
        _load(tmp_path, drafter)
    save_drafter(tmp_path, drafter)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        _load(tmp_path, drafter)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_projection(tmp_path, TARGET, torch.float32)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        fingerprint(tmp_path)


def test_deepspec_fields_that_say_nothing_here_are_ignored(tmp_path: Path) -> None:
    save_drafter(tmp_path, _drafter(CONFIGS["vanilla"]))
    _edit_config(tmp_path, num_anchors=512, use_cache=True, initializer_range=0.02)
    assert read_drafter_config(tmp_path) == CONFIGS["vanilla"]


def test_drafters_are_found_by_path_and_by_name(tmp_path: Path) -> None:
    assert resolve_drafter_path(str(tmp_path)) == tmp_path
    for name in shipped_drafters():
        assert (resolve_drafter_path(name) / "config.json").is_file()
    with pytest.raises(ConfigError, match="'no-such-drafter'"):
        resolve_drafter_path("no-such-drafter")
