"""Gemma text decoders against `transformers`, and what of their configurations is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from dspark_core.errors import CheckpointError, ConfigError
from dspark_core.models.config import DecoderConfig, draft_backbone
from dspark_core.models.gemma import build_decoder
from dspark_core.models.gemma_config import LayerType
from dspark_core.models.hf import read_hf_config
from dspark_core.models.loading import LoadedTarget, load_target
from dspark_core.models.native_decoder import native_decoder
from dspark_core.training.data.conversations import Conversation
from dspark_core.training.data.prefill import compute_packed
from tests.unit.models.gemma_tiny import FULL, GEMMAS, SLIDING, VOCAB, WINDOW, gemma3, gemma4, gemma4_small
from tests.unit.models.target_checkpoints import edit_json, save_hf

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
PARTIAL = {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}


def prompt_of(length: int, seed: int = 1) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def load(model: PreTrainedModel, directory: Path, *, pack: bool = False) -> LoadedTarget:
    return load_target(str(save_hf(model, directory)), torch.float32, pack=pack)


def reference(model: Any, prompt: Sequence[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Outputs of the embedding and of every layer, and the logits, all of `transformers`."""
    outputs: list[torch.Tensor] = []
    hooks = [
        # A copy: Gemma 4 scales its layers' outputs in place.
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output[0].clone()))
        for module in (model.model.embed_tokens, *model.model.layers)
    ]
    with torch.no_grad():
        logits = model(torch.tensor([list(prompt)])).logits[0]
    for hook in hooks:
        hook.remove()
    return outputs, logits


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("name", GEMMAS)
def test_logits_and_every_layer_equal_transformers_past_the_window(
    name: str, pack: bool, tmp_path: Path
) -> None:
    model, prompts = GEMMAS[name](), [prompt_of(5 * WINDOW), prompt_of(3, seed=2)]
    target = load(model, tmp_path, pack=pack)
    layers = tuple(range(-1, target.config.num_layers))

    found = compute_packed(target.decoder, [Conversation(tuple(p), ()) for p in prompts], layers)

    for prompt, features in zip(prompts, found, strict=True):
        outputs, logits = reference(model, prompt)
        torch.testing.assert_close(features.taps, torch.cat(outputs, dim=-1), **TOLERANCE)
        torch.testing.assert_close(target.decoder.logits(features.final), logits, **TOLERANCE)


def test_the_cap_is_felt() -> None:
    prompt = prompt_of(20)
    _, capped = reference(gemma4(), prompt)
    _, plain = reference(gemma4(final_logit_softcapping=None), prompt)
    assert plain.abs().max() > 3.0 > capped.abs().max()  # or the equality above would prove nothing


def test_normalizers_of_training_features_are_of_the_capped_logits(tmp_path: Path) -> None:
    model, prompt = gemma4(), prompt_of(12)
    decoder = load(model, tmp_path).decoder
    (features,) = compute_packed(decoder, [Conversation(tuple(prompt[:8]), tuple(prompt[8:]))], (0,))
    _, logits = reference(model, prompt)
    torch.testing.assert_close(features.log_normalizers[7:], logits.logsumexp(-1)[7:], **TOLERANCE)


@pytest.mark.parametrize("name", GEMMAS)
def test_bfloat16_is_as_close_as_bfloat16_is(name: str, tmp_path: Path) -> None:
    model, prompt = GEMMAS[name](), prompt_of(4 * WINDOW)
    directory = save_hf(model, tmp_path)
    _, exact = reference(model, prompt)
    _, theirs = reference(model.to(torch.bfloat16), prompt)
    decoder = load_target(str(directory), torch.bfloat16).decoder
    (features,) = compute_packed(decoder, [Conversation(tuple(prompt), ())], (0,))
    ours = decoder.logits(features.final)
    assert ours.dtype is torch.bfloat16
    allowed = 1.5 * (theirs.float() - exact).norm()
    assert (ours.float() - exact).norm() < allowed


@pytest.mark.parametrize("outer", [True, False])
def test_a_whole_models_ties_are_its_text_parts(outer: bool, tmp_path: Path) -> None:
    save_hf(gemma4(), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    edit_json(
        tmp_path / "config.json",
        architectures=["Gemma4ForConditionalGeneration"],
        text_config=values | {"tie_word_embeddings": not outer},
        tie_word_embeddings=outer,
    )
    assert read_hf_config(tmp_path).tie_word_embeddings is outer


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_text_part_of_a_multimodal_checkpoint_is_read(prefix: str, tmp_path: Path) -> None:
    model = gemma4_small()
    plain = load(model, tmp_path / "plain")
    directory = save_hf(model, tmp_path / "whole")
    tensors = load_file(directory / "model.safetensors")
    renamed = {name.replace("model.", prefix, 1): value for name, value in tensors.items()}
    renamed |= {"model.vision_tower.patch.weight": torch.ones(3, dtype=torch.int32)}
    # Published checkpoints keep projections that sharing layers do not use.
    renamed |= {
        f"{prefix}layers.5.self_attn.{name}.weight": torch.ones(2, 2) for name in ("k_proj", "v_proj")
    }
    save_file(renamed, directory / "model.safetensors")
    values = json.loads((directory / "config.json").read_text())
    whole = {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "text_config": values,
        "vision_config": {},
    }
    (directory / "config.json").write_text(json.dumps(whole))

    found = load_target(str(directory), torch.float32, pack=False)

    assert (found.config, found.fingerprint) == (plain.config, plain.fingerprint)
    state = plain.decoder.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in found.decoder.state_dict().items())


def test_both_layouts_of_gemma4s_full_layers_are_the_same(tmp_path: Path) -> None:
    model = GEMMAS["gemma4 large"]()
    written = load(model, tmp_path / "a").config
    directory = save_hf(model, tmp_path / "b")
    # As published, before `per_layer_config`.
    fields = {"per_layer_config": ..., "global_head_dim": 32, "num_global_key_value_heads": 1}
    edit_json(directory / "config.json", **fields)
    assert load_target(str(directory), torch.float32, pack=False).config == written


def test_gemma3s_old_rope_layout_is_the_same(tmp_path: Path) -> None:
    written = load(gemma3(), tmp_path).config
    edit_json(
        tmp_path / "config.json",
        rope_parameters=...,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    assert load_target(str(tmp_path), torch.float32, pack=False).config == written


@pytest.mark.parametrize("scaling", [{"rope_type": "linear", "factor": 8.0}, {"type": "linear"}])
def test_gemma3s_rope_layouts_may_stand_together_where_they_agree(
    scaling: dict[str, object], tmp_path: Path
) -> None:
    written = load(gemma3(), tmp_path).config
    edit_json(tmp_path / "config.json", rope_scaling=scaling)
    assert load_target(str(tmp_path), torch.float32, pack=False).config == written
    edit_json(tmp_path / "config.json", rope_scaling=scaling | {"factor": 2.0})
    with pytest.raises(CheckpointError, match=r"rope_scaling=.* does not agree with rope_parameters"):
        load_target(str(tmp_path), torch.float32)


@pytest.mark.parametrize("make", [gemma3, gemma4])
def test_a_theta_beside_the_layers_rope_is_theirs(make: Callable[[], Any], tmp_path: Path) -> None:
    model, prompt = make(), prompt_of(5 * WINDOW)
    save_hf(model, tmp_path)
    kinds = {SLIDING: {"rope_type": "default"}, FULL: {"rope_type": "linear", "factor": 2.0}}
    edit_json(tmp_path / "config.json", rope_parameters=kinds, rope_theta=5e4, rope_local_base_freq=7e3)
    decoder = load_target(str(tmp_path), torch.float32, pack=False).decoder
    (features,) = compute_packed(decoder, [Conversation(tuple(prompt), ())], (0,))
    twin = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    torch.testing.assert_close(decoder.logits(features.final), reference(twin, prompt)[1], **TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5}},
            r"rope_parameters=.* must be by layer type, .*, but has 'rope_type'",
        ),
        ({"rope_parameters": {SLIDING: {}, "chunked_attention": {}}}, "but has 'chunked_attention'"),
        ({"rope_parameters": {FULL: {"factor": 8.0}}}, "factor=8.0 has no effect without a rope_type"),
        (
            {"rope_parameters": ..., "rope_scaling": {"factor": 8.0}},
            "factor=8.0 has no effect without a rope",
        ),
        (
            {"rope_parameters": {FULL: {"rope_type": "linear", "type": "default", "factor": 8.0}}},
            "type='default' does not agree with rope_type='linear'",
        ),
        ({"rope_theta": 500.0}, r"rope_theta=500\.0 does not agree with rope_parameters\['full_attention'\]"),
        ({"rope_local_base_freq": 500.0}, r"rope_local_base_freq=500\.0 does not agree .*sliding_attention"),
    ],
)
def test_rope_settings_of_gemma3_that_would_have_no_effect_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_hf(gemma3(), tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        read_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("enable_moe_block", True, "enable_moe_block=True is not supported"),
        ("hidden_activation", "silu", "hidden_activation='silu' is not supported"),
        ("attn_logit_softcapping", 50.0, "attn_logit_softcapping=50.0 is not supported"),
        ("use_bidirectional_attention", "all", "use_bidirectional_attention='all' is not supported"),
        ("quantization_config", {"bits": 4}, "quantization_config=.* is not supported"),
        ("layer_types", [SLIDING] * 3, "layer_types=.* must name num_hidden_layers=4 layers"),
        ("layer_types", [FULL, FULL, FULL, "linear"], "layer_types=.* must name num_hidden_layers=4 layers"),
        ("layer_types", [FULL, FULL, FULL, SLIDING], "layer_types=.* must end with 'full_attention'"),
        ("num_kv_shared_layers", 4, r"num_kv_shared_layers must be in \[0, 4\), got 4"),
        ("num_kv_shared_layers", 3, "num_kv_shared_layers=3 leaves no full_attention layer"),
        ("num_kv_shared_layers", -1, "num_kv_shared_layers=-1 must be an integer >= 0"),
        ("per_layer_config", {"0": {"head_dim": 8}}, "per_layer_config=.* is not supported"),
        ("per_layer_config", {"1": {"head_dim": 8}}, "per_layer_config=.* is not supported"),
        ("per_layer_config", {"1": {"x": 8}, "3": {"x": 8}}, "per_layer_config=.* is not supported"),
        ("rope_parameters", None, "rope_parameters=None must be an object"),
        ("rope_parameters", {SLIDING: {}, FULL: {"rope_type": "yarn"}}, "rope_type='yarn' is not supported"),
        ("rope_parameters", {"rope_theta": 5e4}, "rope_parameters=.* with one named 'sliding_attention'"),
        ("rope_parameters", {SLIDING: {}, FULL: 3}, "rope_parameters=.* with one named 'full_attention'"),
        ("rope_parameters", {SLIDING: {}, FULL: PARTIAL}, "partial_rotary_factor=0.5 is not supported"),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}, "rope_scaling=.* does not agree"),
        ("hidden_size_per_layer_input", None, "hidden_size_per_layer_input is missing"),
        ("sliding_window", None, "sliding_window is missing"),
        ("num_key_value_heads", 3, "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ("final_logit_softcapping", 0.0, "final_logit_softcapping=0.0 must be a positive number"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(
    field: str, value: object, message: str, tmp_path: Path
) -> None:
    save_hf(gemma4(), tmp_path)
    edit_json(tmp_path / "config.json", **{field: value})
    with pytest.raises(CheckpointError, match=message):
        load_target(str(tmp_path), torch.float32)


def test_a_small_per_layer_table_is_refused(tmp_path: Path) -> None:
    save_hf(gemma4_small(), tmp_path)
    edit_json(tmp_path / "config.json", vocab_size_per_layer_input=50)
    with pytest.raises(CheckpointError, match="vocab_size_per_layer_input=50 must be at least vocab_size=96"):
        load_target(str(tmp_path), torch.float32)


def test_native_kernels_leave_gemma_to_pytorch(tmp_path: Path) -> None:
    assert native_decoder(load(gemma4(), tmp_path, pack=True).decoder) is None


def test_sharing_layers_cost_no_cache(tmp_path: Path) -> None:
    config = load(gemma4_small(), tmp_path).config
    assert config.num_cached_layers == 4
    # Two sliding layers of 2 x 16 and two full ones of 2 x 32, keys and values.
    assert config.kv_values_per_token == 2 * (2 * 2 * 16 + 2 * 2 * 32)


def test_a_drafters_layers_are_full_attention_with_their_own_keys(tmp_path: Path) -> None:
    target = load(gemma4_small(), tmp_path).config
    backbone = draft_backbone(target, 2)
    assert backbone.gemma is not None
    assert backbone.gemma.layer_types == (LayerType.FULL, LayerType.FULL)
    assert (backbone.num_cached_layers, backbone.gemma.per_layer_input_size) == (2, 0)
    assert backbone.final_logit_softcap == target.final_logit_softcap == 3.0
    assert backbone.embedding_scale == 8.0


def test_layer_types_must_fit_the_number_of_layers(tmp_path: Path) -> None:
    config = load(gemma4(), tmp_path).config
    fields = {name: getattr(config, name) for name in config.__slots__}
    with pytest.raises(ConfigError, match="layer_types must name num_layers=2 layers, got 4"):
        DecoderConfig(**(fields | {"num_layers": 2}))


def test_a_fresh_decoder_of_either_kind_has_the_tensors_of_its_layout(tmp_path: Path) -> None:
    for index, name in enumerate(GEMMAS):
        target = load(GEMMAS[name](), tmp_path / str(index))
        fresh = {key: value.shape for key, value in build_decoder(target.config).named_parameters()}
        assert fresh == {key: value.shape for key, value in target.decoder.named_parameters()}
