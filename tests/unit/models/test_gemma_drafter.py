"""Drafters with Gemma layers: the same layer as the target's, and checkpoints in DeepSpec's names."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dspark_core.errors import CheckpointError, ConfigError
from dspark_core.models.config import DrafterConfig, Eagle3Config, draft_backbone
from dspark_core.models.drafter_checkpoint import load_drafter, save_drafter
from dspark_core.models.drafter_config import read_any_config
from dspark_core.models.dspark import DSparkDrafter, build_draft_layer, greedy_sampler
from dspark_core.models.gemma import build_decoder
from dspark_core.models.layers import build_rotary
from dspark_core.models.loading import LoadedTarget, load_target
from dspark_core.training.data.prefill import PackedCausalAttention
from dspark_core.training.initial import new_drafter, target_layer_state
from dspark_core.training.objectives.eagle3 import new_eagle3
from tests.unit.models.gemma_tiny import GEMMAS, VOCAB
from tests.unit.models.target_checkpoints import edit_json, save_hf

NAMES = ("gemma4 large", "gemma4 small", "gemma3")


def load(name: str, directory: Path) -> LoadedTarget:
    return load_target(str(save_hf(GEMMAS[name](), directory / "target")), torch.float32, pack=False)


def tiny(target: LoadedTarget) -> DSparkDrafter:
    config = DrafterConfig(
        backbone=draft_backbone(target.config, 2),
        num_target_layers=target.config.num_layers,
        target_layer_ids=(0, 2),
        block_size=4,
        mask_token_id=VOCAB - 1,
        markov_rank=4,
        confidence_head=True,
    )
    torch.manual_seed(0)
    return new_drafter(config, target.decoder, None, (1, 3)).eval().requires_grad_(False)


@pytest.mark.parametrize("name", ["gemma4 large", "gemma3"])
def test_a_draft_layer_is_the_targets_own_layer(name: str, tmp_path: Path) -> None:
    target = load(name, tmp_path)
    gemma = target.config.gemma
    assert gemma is not None
    one = draft_backbone(target.config, 1)
    layer = build_draft_layer(one)
    layer.load_state_dict(target_layer_state(target.decoder, 1))
    lone = build_decoder(dataclasses.replace(one, tie_word_embeddings=False))
    state = target.decoder.state_dict()
    lone.layers[0].load_state_dict(target.decoder.layers[1].state_dict())
    lone.embed_tokens.weight.data.copy_(state["embed_tokens.weight"])
    ids, positions = torch.randint(0, VOCAB, (30,)), torch.arange(30)
    attend = PackedCausalAttention([30], [None])
    with torch.no_grad():
        taps = lone(ids, positions, attend, (-1, 0)).taps
        embedded, expected = taps.chunk(2, dim=-1)
        cos, sin = build_rotary(one)(positions, torch.float32)
        found = layer(0, embedded, cos, sin, attend)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_survives_being_written_and_read(name: str, tmp_path: Path) -> None:
    target = load(name, tmp_path)
    drafter = tiny(target)
    save_drafter(tmp_path / "drafter", drafter)
    embed, head = target.decoder.embed_tokens.weight, target.decoder.lm_head.weight

    found = load_drafter(tmp_path / "drafter", embed, head, target.config, torch.float32)

    assert found.config == drafter.config
    state = drafter.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in found.state_dict().items())
    assert found.embed_tokens.data_ptr() == embed.data_ptr()  # shared, not scaled into a copy
    hidden = torch.randn(2, 4, 64) * 5
    anchors = torch.tensor([3, 7])
    assert torch.equal(found.base_logits(hidden), drafter.base_logits(hidden))
    drawn = found.draw(anchors, hidden, greedy_sampler)
    assert torch.equal(drawn.token_ids, drafter.draw(anchors, hidden, greedy_sampler).token_ids)


def test_names_and_fields_are_deepspecs(tmp_path: Path) -> None:
    save_drafter(tmp_path / "drafter", tiny(load("gemma4 large", tmp_path)))
    fields = json.loads((tmp_path / "drafter" / "config.json").read_text())
    assert fields["architectures"] == ["Gemma4DSparkModel"]
    assert fields["layer_types"] == ["full_attention"] * 2
    assert (fields["global_head_dim"], fields["num_global_key_value_heads"]) == (32, 1)
    tensors = load_file(tmp_path / "drafter" / "model.safetensors")
    layer = {name.removeprefix("layers.1.") for name in tensors if name.startswith("layers.1.")}
    assert layer == {
        "layer_scalar",
        *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
        *(f"self_attn.{part}.weight" for part in ("q_proj", "k_proj", "o_proj", "q_norm", "k_norm")),
        *(f"{place}_layernorm.weight" for place in ("input", "post_attention")),
        *(f"{place}_feedforward_layernorm.weight" for place in ("pre", "post")),
    }


def test_draft_logits_are_capped_before_the_markov_bias(tmp_path: Path) -> None:
    drafter = tiny(load("gemma4 large", tmp_path))
    hidden = torch.randn(1, 4, 64) * 100
    plain = hidden @ drafter.lm_head.T
    torch.testing.assert_close(drafter.base_logits(hidden), 3.0 * torch.tanh(plain / 3.0))
    before = drafter.float_logits(hidden)
    drafter.pack()
    torch.testing.assert_close(drafter.float_logits(hidden), before)
    torch.testing.assert_close(drafter.base_logits(hidden), before)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layer_types", ["sliding_attention", "full_attention"], "must be 'full_attention' throughout"),
        ("hidden_size_per_layer_input", 8, "hidden_size_per_layer_input=8 must be 0 in a drafter"),
        ("num_kv_shared_layers", 1, "num_kv_shared_layers=1 must be 0 in a drafter"),
    ],
)
def test_a_target_feature_in_a_drafter_is_refused(
    field: str, value: object, message: str, tmp_path: Path
) -> None:
    save_drafter(tmp_path / "drafter", tiny(load("gemma4 large", tmp_path)))
    edit_json(tmp_path / "drafter" / "config.json", vocab_size_per_layer_input=VOCAB, **{field: value})
    with pytest.raises(CheckpointError, match=message):
        read_any_config(tmp_path / "drafter")


@pytest.mark.parametrize(("name", "layer"), [("gemma4 small", 5), ("gemma3", 2)])
def test_a_source_layer_of_another_shape_is_refused(name: str, layer: int, tmp_path: Path) -> None:
    target = load(name, tmp_path)
    with pytest.raises(ConfigError, match=rf"source_layers must be full-attention .* \[1, 3\], got {layer}"):
        target_layer_state(target.decoder, layer)


def test_an_eagle3_layer_starts_as_the_targets_own_layer(tmp_path: Path) -> None:
    target = load("gemma4 large", tmp_path)
    config = Eagle3Config(
        backbone=draft_backbone(target.config, 1), num_target_layers=4, target_layer_ids=(0,), block_size=3
    )
    drafter, ids = new_eagle3(config, target, None, 1), torch.randint(0, VOCAB, (30,))
    drafter.layer.self_attn.q_proj.weight.data[:, :64] = 0.0  # the halves that read the embedding
    drafter.layer.self_attn.k_proj.weight.data[:, :64] = 0.0
    attend, layer = PackedCausalAttention([30], [None]), build_draft_layer(config.backbone)
    layer.load_state_dict(target_layer_state(target.decoder, 1))
    cos, sin = build_rotary(config.backbone)(torch.arange(30), torch.float32)
    with torch.no_grad():
        hidden = drafter.embedded(ids)
        found = drafter.layer(torch.randn(30, 64), hidden, cos, sin, attend)
        expected = layer(0, hidden, cos, sin, attend)
        logits = drafter.logits(hidden * 10)
    torch.testing.assert_close(hidden, 8.0 * target.decoder.embed_tokens.weight[ids])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    plain = drafter.norm(hidden * 10) @ drafter.lm_head.T
    torch.testing.assert_close(logits, 3.0 * torch.tanh(plain / 3.0))
