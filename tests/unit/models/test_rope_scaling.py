"""Contexts stretched by `linear` and `yarn` scaling: tables and logits are those of `transformers`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from dspark_core.errors import CheckpointError
from dspark_core.models.hf import read_hf_config
from dspark_core.models.layers import RotaryEmbedding
from dspark_core.models.loading import load_target
from dspark_core.models.rope_scaling import LinearScaling, YarnScaling
from tests.unit.models.target_checkpoints import (
    LINEAR_ROPE,
    YARN_ROPE,
    CausalAttend,
    edit_json,
    llama,
    qwen3,
    save_hf,
)

ROPES: dict[str, dict[str, Any]] = {
    "linear": LINEAR_ROPE,
    "yarn": YARN_ROPE,
    "yarn, no original": {n: v for n, v in YARN_ROPE.items() if n != "original_max_position_embeddings"},
    "yarn, bounds": YARN_ROPE | {"beta_fast": 8, "beta_slow": 0.5, "truncate": False},
    "yarn, attention": YARN_ROPE | {"attention_factor": 0.7},
    "yarn, mscale": YARN_ROPE | {"mscale": 1.3, "mscale_all_dim": 0.7},
    "yarn, mscale alone": YARN_ROPE | {"mscale": 1.3},
    "yarn, not stretched": YARN_ROPE | {"factor": 1.0, "original_max_position_embeddings": 64},
    "yarn, fraction": YARN_ROPE | {"factor": 2.5},
}
CARD = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
"""What Qwen3's model card tells to add to a file that says 40960 positions."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(qwen3(), tmp_path_factory.mktemp("qwen3"))


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("build", [llama, qwen3])
def test_logits_over_the_whole_stretched_context_equal_transformers(
    build: Any, name: str, pack: bool, tmp_path: Path
) -> None:
    model = build(rope_parameters=ROPES[name])
    decoder = load_target(str(save_hf(model, tmp_path)), torch.float32, pack=pack).decoder
    length = decoder.config.max_context_tokens
    prompt = torch.randint(0, 96, (length,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(prompt[None]).logits[0]
    attend, found = CausalAttend(), []
    for start, end in itertools.pairwise((0, 31, length // 2, length)):
        attend.lengths = [end - start]
        with torch.inference_mode():
            hidden = decoder(prompt[start:end], torch.arange(start, end), attend).hidden
            found.append(decoder.logits(hidden))
    torch.testing.assert_close(torch.cat(found), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_tables_are_those_of_transformers_bit_by_bit(kind: str, directory: Path) -> None:
    """Of Qwen3's own geometry over its whole stretched context: far out, a rounding is multiplied by the
    position. Powers of two would round nothing."""
    fields = {"head_dim": 128, "rope_theta": 1e6, "max_position_embeddings": 32768}
    scaling = CARD | {"rope_type": kind, "factor": 3.7}
    edit_json(directory / "config.json", rope_parameters=..., rope_scaling=scaling, **fields)
    tables = RotaryEmbedding(read_hf_config(directory))
    positions = int(3.7 * 32768)
    assert len(tables.cos) == positions
    theirs = Qwen3RotaryEmbedding(Qwen3Config(rope_parameters=scaling | {"rope_theta": 1e6}, head_dim=128))
    cos, sin = theirs(torch.zeros(1), torch.arange(positions)[None])
    assert torch.equal(tables.cos, cos[0])
    assert torch.equal(tables.sin, sin[0])


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_what_the_model_card_says_is_read_with_its_context(kind: str, directory: Path) -> None:
    scaling = {kind if name == "rope_type" else name: value for name, value in CARD.items()}
    edit_json(
        directory / "config.json",
        rope_parameters=...,
        rope_theta=1e6,
        rope_scaling=scaling,
        max_position_embeddings=40960,
    )
    config = read_hf_config(directory)
    assert config.max_context_tokens == 131_072
    assert config.rope_scaling == YarnScaling(
        factor=4.0, original_max_positions=32768, attention_factor=pytest.approx(1.1386294)
    )


def test_a_linear_factor_stretches_the_positions_a_file_says(directory: Path) -> None:
    edit_json(directory / "config.json", rope_parameters=LINEAR_ROPE | {"factor": 2.5})
    config = read_hf_config(directory)
    assert config.rope_scaling == LinearScaling(factor=2.5, original_max_positions=64)
    assert config.max_context_tokens == 160


def test_original_positions_beside_the_settings_count(directory: Path) -> None:
    """As in `transformers`."""
    edit_json(directory / "config.json", rope_parameters=YARN_ROPE, original_max_position_embeddings=16)
    config = read_hf_config(directory)
    assert config.rope_scaling is not None
    assert (config.rope_scaling.original_max_positions, config.max_context_tokens) == (16, 64)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (YARN_ROPE | {"factor": None}, "rope_parameters: factor is missing"),
        (LINEAR_ROPE | {"factor": 0.5}, "the factor of RoPE scaling must be at least 1, got 0.5"),
        (YARN_ROPE | {"beta_fast": 0.5}, "beta_fast must be at least beta_slow=1.0, got 0.5"),
        (YARN_ROPE | {"attention_factor": 0}, "attention_factor=0 must be a positive number"),
        (YARN_ROPE | {"truncate": 1}, "truncate=1 must be true or false"),
        (YARN_ROPE | {"attn_factor": 1.0}, "attn_factor=1.0 is not supported where rope_type is 'yarn'"),
        (
            YARN_ROPE | {"mrope_section": [8, 8]},
            "mrope_section=.* is not supported where rope_type is 'yarn'",
        ),
        (LINEAR_ROPE | {"beta_fast": 32}, "beta_fast=32 is not supported where rope_type is 'linear'"),
        (YARN_ROPE | {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    ],
)
def test_what_is_not_understood_is_named(rope: dict[str, Any], message: str, directory: Path) -> None:
    edit_json(directory / "config.json", rope_parameters=rope)
    with pytest.raises(CheckpointError, match=message):
        read_hf_config(directory)
