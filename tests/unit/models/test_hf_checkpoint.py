"""Hugging Face directories: layouts that must load, and damage that must be named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_core.errors import CheckpointError
from dspark_core.models.hf import read_hf_config
from dspark_core.models.loading import load_target, load_target_ends
from dspark_core.models.rope_scaling import LinearScaling, RopeScaling
from tests.unit.models.target_checkpoints import LINEAR_ROPE, LLAMA3_ROPE, edit_json, llama, qwen3, save_hf


@pytest.fixture(scope="module")
def saved_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(llama(), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def directory(saved_llama: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for file in saved_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def load_error(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_target(str(directory), torch.float32)
    return str(caught.value)


def edit_tensors(directory: Path, **changes: Any) -> None:
    """Changes tensors, `__` standing for a dot; `...` removes one."""
    path = directory / "model.safetensors"
    renamed = {name.replace("__", "."): value for name, value in changes.items()}
    tensors = load_file(path) | renamed
    save_file({name: value for name, value in tensors.items() if value is not ...}, path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_finite_numbers_are_named(directory: Path, value: float) -> None:
    """As a damaged file has them: every answer would be noise, and no error would tell."""
    name = "model.layers.1.mlp.up_proj.weight"
    damaged = load_file(directory / "model.safetensors")[name].clone()
    damaged[3, 7] = value
    edit_tensors(directory, **{name: damaged})
    assert f"{name}: holds values that are infinite or no numbers" in load_error(directory)


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_rope_settings_of_older_configs_are_understood(directory: Path, kind: str) -> None:
    scaling = {name: value for name, value in LLAMA3_ROPE.items() if name not in ("rope_type", "rope_theta")}
    edit_json(
        directory / "config.json",
        rope_parameters=...,
        rope_theta=500000.0,
        rope_scaling=scaling | {kind: "llama3"},
    )
    config = read_hf_config(directory)
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == RopeScaling(
        factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32
    )


def test_rope_settings_of_newer_configs_are_understood(directory: Path) -> None:
    edit_json(directory / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    config = read_hf_config(directory)
    assert (config.rope_theta, config.rope_scaling) == (77.0, None)


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_both_layouts_of_rope_settings_may_stand_together_in_agreement(directory: Path, kind: str) -> None:
    values = {name: value for name, value in LLAMA3_ROPE.items() if name not in ("rope_type", "rope_theta")}
    scaling = values | {kind: "llama3"}
    edit_json(directory / "config.json", rope_parameters=LLAMA3_ROPE, rope_scaling=scaling)
    assert read_hf_config(directory).rope_scaling is not None
    edit_json(directory / "config.json", rope_scaling=scaling | {"factor": 2.0})
    assert "does not agree with rope_parameters" in load_error(directory)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "factor": 1.0, "original_max_position_embeddings": 64},
        {"rope_type": "default", "type": "default", "rope_theta": 10000, "partial_rotary_factor": 1.0},
        {"rope_theta": None, "attention_factor": None},
    ],
)
def test_rope_settings_that_change_nothing_are_no_obstacle(directory: Path, rope: dict[str, Any]) -> None:
    edit_json(directory / "config.json", rope_parameters=rope, rope_theta=10000.0)
    config = read_hf_config(directory)
    assert (config.rope_theta, config.rope_scaling) == (10000.0, None)


def test_a_type_under_both_its_names_is_understood(directory: Path) -> None:
    """As `transformers` saves what it read in the older layout."""
    edit_json(directory / "config.json", rope_parameters=LINEAR_ROPE | {"type": "linear"})
    assert read_hf_config(directory).rope_scaling == LinearScaling(factor=4.0, original_max_positions=64)


def test_original_positions_beside_the_rope_settings_count(directory: Path) -> None:
    """As in `transformers`."""
    edit_json(directory / "config.json", rope_parameters=LLAMA3_ROPE, original_max_position_embeddings=16)
    scaling = read_hf_config(directory).rope_scaling
    assert scaling is not None
    assert scaling.original_max_positions == 16


def test_absent_optional_fields_take_the_format_s_defaults(directory: Path) -> None:
    edit_json(directory / "config.json", num_key_value_heads=..., head_dim=..., rope_parameters=...)
    config = read_hf_config(directory)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (4, 16, 10000.0)


def test_a_sharded_checkpoint_equals_a_single_file(directory: Path, tmp_path_factory: Any) -> None:
    sharded = save_hf(llama(), tmp_path_factory.mktemp("sharded"), max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    whole, parts = load_target(str(directory), torch.float32), load_target(str(sharded), torch.float32)
    assert parts.fingerprint == whole.fingerprint
    torch.testing.assert_close(parts.decoder.state_dict(), whole.decoder.state_dict(), rtol=0, atol=0)


def test_an_output_projection_repeated_in_a_tied_model_is_accepted(tmp_path: Path) -> None:
    model = save_hf_tied(tmp_path)
    edit_tensors(tmp_path, lm_head__weight=model.lm_head.weight.detach().clone())
    decoder = load_target(str(tmp_path), torch.float32).decoder
    assert decoder.lm_head.weight is decoder.embed_tokens.weight


@pytest.mark.parametrize("load", [load_target, load_target_ends])
def test_another_output_projection_in_a_tied_model_is_refused(load: Any, tmp_path: Path) -> None:
    """It was trained apart, and `transformers` computes with it."""
    model = save_hf_tied(tmp_path)
    edit_tensors(tmp_path, lm_head__weight=model.lm_head.weight.detach() * 1.01)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: .*tie_word_embeddings=True"):
        load(str(tmp_path), torch.float32)


def test_a_tied_model_without_its_embedding_misses_it(tmp_path: Path) -> None:
    model = save_hf_tied(tmp_path)
    embedding = {"model__embed_tokens__weight": ..., "lm_head__weight": model.lm_head.weight.detach().clone()}
    edit_tensors(tmp_path, **embedding)
    assert "model.embed_tokens.weight: missing tensor" in load_error(tmp_path)


def save_hf_tied(directory: Path) -> Any:
    model = llama(tie_word_embeddings=True)
    save_hf(model, directory)
    return model


def test_constants_of_old_exports_are_ignored(directory: Path) -> None:
    edit_tensors(directory, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))
    load_target(str(directory), torch.float32)


def test_unused_sliding_window_of_qwen3_is_no_obstacle(tmp_path: Path) -> None:
    save_hf(qwen3(), tmp_path)
    edit_json(tmp_path / "config.json", sliding_window=4096, use_sliding_window=False)
    assert read_hf_config(tmp_path).qk_norm


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("architectures", ["GPT2LMHeadModel"], "supported: LlamaForCausalLM, Qwen3ForCausalLM"),
        ("architectures", ..., "supported: LlamaForCausalLM, Qwen3ForCausalLM"),
        ("hidden_act", "gelu", "hidden_act='gelu' is not supported"),
        ("mlp_bias", True, "mlp_bias=True is not supported"),
        ("use_sliding_window", True, "use_sliding_window=True is not supported"),
        ("sliding_window", 4096, "sliding_window=4096 is not supported"),
        ("layer_types", ["full_attention", "sliding_attention"], "layer_types=.* is not supported"),
        ("quantization_config", {"bits": 4}, "quantization_config=.* is not supported"),
        ("rope_parameters", {"rope_type": "dynamic", "factor": 2.0}, "rope_type='dynamic' is not supported"),
        ("rope_parameters", {"rope_type": "longrope"}, "rope_type='longrope' is not supported"),
        ("rope_parameters", {"rope_type": "llama3"}, "rope_parameters: factor is missing"),
        ("rope_parameters", LLAMA3_ROPE | {"low_freq_factor": 4.0}, "high_freq_factor must be above"),
        ("rope_parameters", 7, "rope_parameters=7 must be an object"),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "rope_scaling=.* does not agree with rope_p"),
        ("rope_scaling", 7, "rope_scaling=7 must be an object"),
        ("rope_theta", 500.0, "rope_theta=500.0 does not agree with rope_parameters: leave one of them out"),
        ("rope_parameters", {"factor": 2.0}, "factor=2.0 has no effect without a rope_type that scales"),
        ("rope_parameters", {"rope_type": "default", "factor": 2.0}, "factor=2.0 has no effect without a"),
        ("rope_parameters", {"attention_factor": 0.5}, "attention_factor=0.5 has no effect without a"),
        ("rope_parameters", LINEAR_ROPE | {"type": "yarn"}, "type='yarn' does not agree with rope_type='lin"),
        ("rope_parameters", {"type": "yarn", "rope_type": "default", "factor": 2.0}, "type='yarn' does not"),
        ("rope_parameters", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor=0.5 is not supported"),
        ("vocab_size", ..., "vocab_size is missing"),
        ("vocab_size", "many", "vocab_size='many' must be a positive integer"),
        ("num_hidden_layers", 0, "num_hidden_layers=0 must be a positive integer"),
        ("num_hidden_layers", True, "num_hidden_layers=True must be a positive integer"),
        ("rms_norm_eps", -1.0, "rms_norm_eps=-1.0 must be a positive number"),
        ("tie_word_embeddings", "no", "tie_word_embeddings='no' must be true or false"),
        ("num_key_value_heads", 3, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
    ],
)
def test_unsupported_or_wrong_fields_are_named(directory: Path, field: str, value: Any, message: str) -> None:
    edit_json(directory / "config.json", **{field: value})
    with pytest.raises(CheckpointError, match=message) as caught:
        read_hf_config(directory)
    assert str(directory / "config.json") in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_config_that_is_no_json_object_is_refused(directory: Path, text: str) -> None:
    (directory / "config.json").write_bytes(text.encode("latin-1"))
    assert str(directory / "config.json") in load_error(directory)


def test_a_directory_without_config_is_refused(directory: Path) -> None:
    (directory / "config.json").unlink()
    assert str(directory / "config.json") in load_error(directory)


def test_a_missing_tensor_is_named_with_its_shape(directory: Path) -> None:
    edit_tensors(directory, model__layers__1__mlp__up_proj__weight=...)
    message = load_error(directory)
    assert "model.layers.1.mlp.up_proj.weight: missing tensor, expected shape [96, 64]" in message


def test_a_missing_output_projection_is_named(directory: Path) -> None:
    edit_tensors(directory, lm_head__weight=...)
    assert "lm_head.weight: missing tensor, expected shape [96, 64]" in load_error(directory)


def test_an_unexpected_tensor_is_named(directory: Path) -> None:
    edit_tensors(directory, model__layers__0__self_attn__q_norm__weight=torch.ones(16))
    message = load_error(directory)
    assert f"{directory / 'model.safetensors'}: model.layers.0.self_attn.q_norm.weight: unexpected" in message


@pytest.mark.parametrize(
    ("field", "value", "tensor", "found", "needed"),
    [
        ("vocab_size", 97, "model.embed_tokens.weight", [96, 64], [97, 64]),
        ("hidden_size", 32, "model.embed_tokens.weight", [96, 64], [96, 32]),
        ("intermediate_size", 80, "model.layers.0.mlp.gate_proj.weight", [96, 64], [80, 64]),
        ("num_key_value_heads", 4, "model.layers.0.self_attn.k_proj.weight", [32, 64], [64, 64]),
    ],
)
def test_a_shape_that_does_not_fit_is_named_with_both_shapes(
    directory: Path, field: str, value: int, tensor: str, found: list[int], needed: list[int]
) -> None:
    edit_json(directory / "config.json", **{field: value})
    message = load_error(directory)
    assert f"{directory / 'model.safetensors'}: {tensor}: shape {found}" in message
    assert message.endswith(f"the configuration needs {needed}")


def test_more_layers_than_the_configuration_says_are_refused(directory: Path) -> None:
    edit_json(directory / "config.json", num_hidden_layers=2, layer_types=...)
    message = load_error(directory)
    assert "model.layers.2." in message
    assert "unexpected tensor" in message


def test_integer_tensors_are_refused(directory: Path) -> None:
    edit_tensors(directory, model__norm__weight=torch.ones(64, dtype=torch.int32))
    assert "model.norm.weight: dtype I32 is not supported" in load_error(directory)


@pytest.mark.parametrize("damage", ["empty", "truncated", "absent"])
def test_damaged_weights_are_named(directory: Path, damage: str) -> None:
    path = directory / "model.safetensors"
    if damage == "absent":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100] if damage == "truncated" else b"")
    message = load_error(directory)
    assert message.startswith(f"{path}: cannot be read")


def shard(directory: Path, **weight_map: Any) -> None:
    whole = directory / "model.safetensors"
    names = dict.fromkeys(load_file(whole), "a.safetensors")
    whole.rename(directory / "a.safetensors")
    index = {"weight_map": {name: file for name, file in (names | weight_map).items() if file is not ...}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_tensor_the_index_promises_in_vain_is_named(directory: Path) -> None:
    shard(directory, extra="a.safetensors")
    assert f"{directory / 'a.safetensors'}: missing tensor extra" in load_error(directory)


@pytest.mark.parametrize("file", ["../a.safetensors", 3])
def test_an_index_that_points_outside_the_directory_is_refused(directory: Path, file: Any) -> None:
    shard(directory, extra=file)
    assert f"weight_map['extra']={file!r} is not a file name" in load_error(directory)


def test_an_index_without_a_map_is_refused(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text("{}")
    assert "weight_map is missing" in load_error(directory)
