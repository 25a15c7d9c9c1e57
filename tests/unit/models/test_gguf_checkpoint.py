"""GGUF files against their Hugging Face twins, and damage that must be named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader

from dspark_core.errors import CheckpointError
from dspark_core.models.gguf import GgufCheckpoint
from dspark_core.models.loading import load_target
from tests.unit.models.target_checkpoints import (
    LINEAR_ROPE,
    LLAMA3_ROPE,
    YARN_ROPE,
    CausalAttend,
    gguf_tensors,
    llama,
    quantised_twin,
    qwen3,
    save_hf,
    write_gguf,
)

LLAMA3_FULL = LLAMA3_ROPE | {"original_max_position_embeddings": 8192, "factor": 32.0, "rope_theta": 500000.0}


def load_error(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_target(str(path), torch.float32)
    return str(caught.value)


@pytest.mark.parametrize("kind", [GGMLQuantizationType.F32, GGMLQuantizationType.Q8_0])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("build", [llama, qwen3])
def test_a_gguf_file_equals_its_hugging_face_twin(build: Any, tied: bool, kind: Any, tmp_path: Path) -> None:
    model = build(tie_word_embeddings=tied, attention_bias=True)
    quantised_twin(model, kind)
    path = write_gguf(tmp_path / "twin.gguf", model.config, gguf_tensors(model), matrices=kind)
    from_gguf = load_target(str(path), torch.float32, pack=False)
    from_hf = load_target(str(save_hf(model, tmp_path / "hf")), torch.float32, pack=False)
    assert from_gguf.config.tie_word_embeddings is tied
    torch.testing.assert_close(from_gguf.decoder.state_dict(), from_hf.decoder.state_dict(), rtol=0, atol=0)
    assert logits_of(from_gguf.decoder).allclose(logits_of(from_hf.decoder), atol=1e-5)


def logits_of(decoder: Any) -> torch.Tensor:
    attend = CausalAttend()
    attend.lengths = [12]
    with torch.inference_mode():
        return decoder.logits(decoder(torch.arange(12), torch.arange(12), attend).hidden)


def llama3_factors(head_dim: int) -> np.ndarray:
    """What a converter writes for `LLAMA3_FULL`, by wavelength as Meta's code has it."""
    frequencies = 500000.0 ** -(np.arange(0, head_dim, 2) / head_dim)
    wavelengths = 2 * np.pi / frequencies
    smooth = (8192 / wavelengths - 1.0) / (4.0 - 1.0)
    between = 1 / ((1 - smooth) / 32.0 + smooth)
    return np.where(wavelengths < 8192 / 4, 1.0, np.where(wavelengths > 8192, 32.0, between)).astype("f4")


def test_llama_3_frequency_factors_are_recognised(tmp_path: Path) -> None:
    model = llama(rope_parameters=LLAMA3_FULL, head_dim=32)
    tensors = gguf_tensors(model) | {"rope_freqs.weight": llama3_factors(32)}
    path = write_gguf(tmp_path / "llama3.gguf", model.config, tensors)
    from_gguf = load_target(str(path), torch.float32)
    from_hf = load_target(str(save_hf(model, tmp_path / "hf")), torch.float32)
    assert from_gguf.config.rope_scaling == from_hf.config.rope_scaling
    assert logits_of(from_gguf.decoder).allclose(logits_of(from_hf.decoder), atol=1e-5)


def scaled(kind: gguf.RopeScalingType | None) -> Any:
    """As llama.cpp's converter writes it; None: as files before there were types."""

    def add(writer: gguf.GGUFWriter) -> None:
        if kind is None:
            writer.add_float32(f"{writer.arch}.rope.scale_linear", 4.0)
            return
        writer.add_rope_scaling_type(kind)
        writer.add_rope_scaling_factor(4.0)
        if kind is gguf.RopeScalingType.YARN:
            writer.add_rope_scaling_orig_ctx_len(32)
            writer.add_rope_scaling_finetuned(True)
            writer.add_rope_scaling_yarn_beta_fast(24.0)

    return add


@pytest.mark.parametrize(
    ("rope", "kind"),
    [
        (LINEAR_ROPE, None),
        (LINEAR_ROPE, gguf.RopeScalingType.LINEAR),
        (YARN_ROPE | {"beta_fast": 24.0}, gguf.RopeScalingType.YARN),
    ],
)
@pytest.mark.parametrize("build", [llama, qwen3])
def test_stretched_positions_equal_those_of_the_hugging_face_twin(
    build: Any, rope: Any, kind: gguf.RopeScalingType | None, tmp_path: Path
) -> None:
    model = build(rope_parameters=rope)
    path = write_gguf(tmp_path / "twin.gguf", model.config, gguf_tensors(model), extra=[scaled(kind)])
    from_gguf = load_target(str(path), torch.float32, pack=False)
    from_hf = load_target(str(save_hf(model, tmp_path / "hf")), torch.float32, pack=False)
    assert from_gguf.config.rope_scaling == from_hf.config.rope_scaling is not None
    assert from_gguf.config.max_context_tokens == from_hf.config.max_context_tokens
    assert logits_of(from_gguf.decoder).allclose(logits_of(from_hf.decoder), atol=1e-5)


def test_frequency_factors_beside_a_scaling_are_refused(tmp_path: Path) -> None:
    """llama.cpp computes with both."""
    model = llama(rope_parameters=LLAMA3_FULL, head_dim=32)
    tensors = gguf_tensors(model) | {"rope_freqs.weight": llama3_factors(32)}
    add = [scaled(gguf.RopeScalingType.LINEAR)]
    path = write_gguf(tmp_path / "both.gguf", model.config, tensors, extra=add)
    assert f"{path}: rope_freqs.weight beside rope.scaling.factor is not supported" in load_error(path)


def test_other_frequency_factors_are_refused(tmp_path: Path) -> None:
    model = llama()
    tensors = gguf_tensors(model) | {"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)}
    path = write_gguf(tmp_path / "odd.gguf", model.config, tensors)
    assert f"{path}: rope_freqs.weight: these factors are not Llama 3's" in load_error(path)


@pytest.mark.parametrize("factors", [np.ones(8, dtype=np.float32), np.ones(4, dtype=np.float32)])
def test_factors_must_cover_the_head(factors: np.ndarray, tmp_path: Path) -> None:
    model = llama()
    path = write_gguf(
        tmp_path / "ones.gguf", model.config, gguf_tensors(model) | {"rope_freqs.weight": factors}
    )
    if factors.size == 8:
        assert GgufCheckpoint(path).config.rope_scaling is None
    else:
        assert "rope_freqs.weight: shape [4], the head size needs [8]" in load_error(path)


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda w: w.add_rope_dimension_count(8), "rope.dimension_count=8 is not supported"),
        (lambda w: w.add_sliding_window(128), "attention.sliding_window=128 is not supported"),
        (lambda w: w.add_expert_count(8), "expert_count=8 is not supported"),
        (
            lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
            "rope.scaling.type='longrope' is not supported; supported: 'none', 'linear', 'yarn'",
        ),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "rope.scaling.factor is missing"),
        (
            lambda w: w.add_rope_scaling_yarn_attn_factor(1.5),
            "rope.scaling.yarn_attn_factor=1.5 is not supported",
        ),
        (lambda w: w.add_rope_scaling_alpha(1000.0), "rope.scaling.alpha=1000.0 is not supported"),
        (lambda w: w.add_rope_scaling_factor(0.5), "the factor of RoPE scaling must be at least 1, got 0.5"),
    ],
)
def test_unsupported_settings_are_named(add: Any, message: str, tmp_path: Path) -> None:
    model = llama()
    path = write_gguf(tmp_path / "m.gguf", model.config, gguf_tensors(model), extra=[add])
    assert f"{path}: {message}" in load_error(path)


@pytest.mark.parametrize(
    "add",
    [
        lambda w: w.add_rope_scaling_factor(1.0),
        lambda w: w.add_float32("llama.rope.scale_linear", 0.0),
        lambda w: (w.add_rope_scaling_type(gguf.RopeScalingType.NONE), w.add_rope_scaling_factor(4.0)),
    ],
)
def test_a_factor_that_scales_nothing_is_no_obstacle(add: Any, tmp_path: Path) -> None:
    model = llama()
    path = write_gguf(tmp_path / "m.gguf", model.config, gguf_tensors(model), extra=[add])
    assert GgufCheckpoint(path).config.rope_scaling is None


CHANGING = {
    "attention.scale": 0.5,
    "logit_scale": 0.5,
    "embedding_scale": 2.0,
    "residual_scale": 0.5,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "attention.clamp_kqv": 8.0,
}


def with_field(path: Path, field: str, value: float | bool) -> Path:
    def add(writer: gguf.GGUFWriter) -> None:
        key = f"{writer.arch}.{field}"
        writer.add_bool(key, value) if isinstance(value, bool) else writer.add_float32(key, value)

    model = llama()
    return write_gguf(path, model.config, gguf_tensors(model), extra=[add])


@pytest.mark.parametrize(("field", "value"), [*CHANGING.items(), ("attention.causal", False)])
def test_fields_that_would_change_a_logit_are_refused(field: str, value: float, tmp_path: Path) -> None:
    path = with_field(tmp_path / "m.gguf", field, value)
    assert f"{path}: {field}={value!r}" in load_error(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, 0.0) for field in CHANGING),
        *((field, 1.0) for field in CHANGING if field.endswith("_scale")),
        ("attention.scale", 16**-0.5),
        ("attention.causal", True),
    ],
)
def test_such_fields_with_a_neutral_value_are_no_obstacle(field: str, value: float, tmp_path: Path) -> None:
    assert GgufCheckpoint(with_field(tmp_path / "m.gguf", field, value)).config.num_layers == 3


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    model = llama()
    path = write_gguf(tmp_path / "m.gguf", model.config, gguf_tensors(model), architecture="gemma3")
    assert "general.architecture='gemma3' is not supported; supported: llama, qwen3" in load_error(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blk.1.ffn_up.weight": None}, "blk.1.ffn_up.weight: missing tensor, expected shape [96, 64]"),
        ({"blk.0.attn_q_norm.weight": np.ones(16)}, "blk.0.attn_q_norm.weight: unexpected tensor"),
        ({"blk.0.ffn_gate_exps.weight": np.ones(16)}, "blk.0.ffn_gate_exps.weight: unexpected tensor"),
        ({"blk.3.attn_norm.weight": np.ones(64)}, "blk.3.attn_norm.weight: unexpected tensor"),
        (
            {"blk.2.attn_k.weight": np.ones((64, 64), dtype="f4")},
            "blk.2.attn_k.weight: shape [64, 64], the configuration needs [32, 64]",
        ),
        (
            {"token_embd.weight": np.ones((96, 32), dtype="f4")},
            "token_embd.weight: shape [96, 32], the configuration needs [96, 64]",
        ),
        ({"token_embd.weight": None}, "token_embd.weight: missing"),
    ],
)
def test_tensors_that_do_not_fit_are_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = llama()
    tensors = {name: values for name, values in (gguf_tensors(model) | changes).items() if values is not None}
    path = write_gguf(tmp_path / "m.gguf", model.config, tensors)
    assert f"{path}: {message}" in load_error(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", [GGMLQuantizationType.F32, GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0]
)
def test_weights_that_are_no_finite_numbers_are_named(kind: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """In bfloat16 the kernels compute with quantised ones as they are: their scales tell."""
    model = llama()
    path = write_gguf(tmp_path / "m.gguf", model.config, gguf_tensors(model), matrices=kind)
    tensor = next(t for t in GGUFReader(path).tensors if t.name == "blk.1.ffn_down.weight")
    not_a_number = np.array([np.nan], np.float32 if kind is GGMLQuantizationType.F32 else np.float16)
    damaged = bytearray(path.read_bytes())
    damaged[tensor.data_offset : tensor.data_offset + not_a_number.nbytes] = not_a_number.tobytes()
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_down\.weight: holds values that are infinite"):
        load_target(str(path), dtype)


@pytest.mark.parametrize("keep", [0, 3, 40, 400, -2000])
def test_damaged_files_are_named(keep: int, tmp_path: Path) -> None:
    model = llama()
    path = write_gguf(tmp_path / "m.gguf", model.config, gguf_tensors(model))
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path) in load_error(path)


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    assert f"{path}: cannot be read as GGUF" in load_error(path)
