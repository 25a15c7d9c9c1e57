"""Reads GGUF files through the `gguf` library; quantised tensors are dequantised on reading."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor
from gguf.quants import dequantize
from torch import Tensor

from dspark_core.errors import CheckpointError
from dspark_core.kernels.library import Format
from dspark_core.kernels.matrix import QuantizedRows
from dspark_core.models.config import DecoderConfig, Family
from dspark_core.models.layers import rope_frequencies
from dspark_core.models.metadata import Metadata, naming_file
from dspark_core.models.rope_scaling import (
    AnyRopeScaling,
    LinearScaling,
    RopeScaling,
    YarnScaling,
    reach,
    yarn_attention_factor,
)
from dspark_core.models.tensor_source import checked_finite

ARCHITECTURES = {"llama": Family.LLAMA, "qwen3": Family.QWEN3}

_KERNEL_FORMATS = {GGMLQuantizationType.Q4_1: Format.Q4, GGMLQuantizationType.Q8_0: Format.Q8}
_ROPE_FACTORS = "rope_freqs.weight"
_SCALING = "rope.scaling."
_SCALING_FIELDS = (
    "type",
    "factor",
    "original_context_length",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "finetuned",
)
"""Supported fields after `_SCALING`, and `finetuned`, which has no effect."""
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "attention.clamp_kqv": (0,),
    "attention.causal": (True,),
}
"""Fields of other models, with the values that change nothing; 0 is off, as in llama.cpp."""
_GLOBAL_NAMES = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_PERMUTED = re.compile(r"blk\.\d+\.attn_([qk])\.(weight|bias)")


class GgufCheckpoint:
    """Configuration and `TensorSource` of one file."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError for an unreadable file or an unsupported model."""
        self._path = path
        self._reader = _open(path)
        self._tensors: dict[str, ReaderTensor] = {t.name: t for t in self._reader.tensors}
        self._stored_names = {
            _model_name(stored): stored for stored in self._tensors if stored != _ROPE_FACTORS
        }
        self._shapes = {name: _shape(self._tensors[stored]) for name, stored in self._stored_names.items()}
        self.config = self._read_config()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def describe(self, name: str) -> str:
        return f"{self._path}: {self._stored_names.get(name) or _stored_name(name)}"

    def read(self, name: str) -> Tensor:
        """float32; query and key rows in rotate-half order, whereas Llama files interleave them."""
        stored = self._stored_names[name]
        values = self._ordered(stored, self._dequantize(self._tensors[stored]))
        copied = torch.from_numpy(np.array(values, dtype=np.float32))  # the file is memory-mapped
        return checked_finite(self, name, copied)

    def read_quantized(self, name: str) -> QuantizedRows | None:
        stored = self._stored_names[name]
        tensor = self._tensors[stored]
        kind = _KERNEL_FORMATS.get(tensor.tensor_type)
        if kind is None or len(tensor.shape) != 2:
            return None
        blocks = self._ordered(stored, tensor.data)
        rows = QuantizedRows(kind, torch.from_numpy(np.array(blocks)), inputs=_shape(tensor)[1])
        checked_finite(self, name, rows.scales)
        return rows

    def _ordered(self, stored: str, values: np.ndarray) -> np.ndarray:
        """Rows in the decoder's order; see `read`."""
        permuted = _PERMUTED.fullmatch(stored)
        if permuted is None or self.config.family is not Family.LLAMA:
            return values
        is_query = permuted[1] == "q"
        return deinterleave(values, self.config.num_heads if is_query else self.config.num_kv_heads)

    def _dequantize(self, tensor: ReaderTensor) -> np.ndarray:
        try:
            return dequantize(tensor.data, tensor.tensor_type).reshape(_shape(tensor))
        except (NotImplementedError, ValueError) as error:
            kind = tensor.tensor_type.name
            raise CheckpointError(
                f"{self._path}: {tensor.name}: type {kind} cannot be read: {error}"
            ) from error

    def _read_config(self) -> DecoderConfig:
        architecture = _field(self._reader, "general.architecture")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{self._path}: general.architecture={architecture!r} is not supported; "
                f"supported: {', '.join(ARCHITECTURES)}"
            )
        embedding = self._shapes.get("embed_tokens.weight", ())
        if len(embedding) != 2:
            raise CheckpointError(f"{self.describe('embed_tokens.weight')}: missing, or not a matrix")
        metadata = Metadata(str(self._path), _metadata(self._reader, f"{architecture}."))
        with naming_file(metadata.origin):
            return _decoder_config(
                metadata,
                ARCHITECTURES[architecture],
                vocab_size=embedding[0],
                tied="lm_head.weight" not in self._shapes,
                attention_bias="layers.0.self_attn.q_proj.bias" in self._shapes,
                rope_factors=self._rope_factors(),
            )

    def _rope_factors(self) -> np.ndarray | None:
        tensor = self._tensors.get(_ROPE_FACTORS)
        return None if tensor is None else self._dequantize(tensor)


def deinterleave(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows [heads * head_dim, ...] from interleaved rotation pairs to rotate-half order."""
    pairs = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _decoder_config(
    metadata: Metadata,
    family: Family,
    *,
    vocab_size: int,
    tied: bool,
    attention_bias: bool,
    rope_factors: np.ndarray | None,
) -> DecoderConfig:
    hidden_size = metadata.integer("embedding_length")
    num_heads = metadata.integer("attention.head_count")
    head_dim = metadata.integer("attention.key_length", hidden_size // num_heads)
    rope_theta = metadata.number("rope.freq_base", 10000.0)
    _refuse_unsupported(metadata, head_dim)
    scaling = _rope_scaling(metadata, rope_factors, rope_theta, head_dim)
    return DecoderConfig(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=metadata.integer("feed_forward_length"),
        num_layers=metadata.integer("block_count"),
        num_heads=num_heads,
        num_kv_heads=metadata.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_norm_eps=metadata.number("attention.layer_norm_rms_epsilon"),
        rope_theta=rope_theta,
        max_context_tokens=reach(scaling, metadata.integer("context_length")),
        rope_scaling=scaling,
        tie_word_embeddings=tied,
        qk_norm=family is Family.QWEN3,
        attention_bias=attention_bias,
    )


def _rope_scaling(
    metadata: Metadata, factors: np.ndarray | None, theta: float, head_dim: int
) -> AnyRopeScaling | None:
    named = _named_scaling(metadata)
    recognised = _recognised_scaling(factors, theta, head_dim, metadata.origin)
    if named is not None and recognised is not None:
        raise CheckpointError(f"{metadata.origin}: {_ROPE_FACTORS} beside {_SCALING}factor is not supported")
    return named or recognised


def _named_scaling(metadata: Metadata) -> LinearScaling | YarnScaling | None:
    """Follows llama.cpp, whose default is linear scaling."""
    kind = metadata.get(f"{_SCALING}type")
    if kind not in (None, "none", "linear", "yarn"):
        raise metadata.error(f"{_SCALING}type", "is not supported; supported: 'none', 'linear', 'yarn'")
    for field in metadata.values:
        if field.startswith(_SCALING) and field.removeprefix(_SCALING) not in _SCALING_FIELDS:
            raise metadata.error(field, "is not supported")
    field = f"{_SCALING}factor"
    original = metadata.integer(f"{_SCALING}original_context_length", metadata.integer("context_length"))
    if kind == "yarn":
        factor = metadata.number(field)
        return YarnScaling(
            factor=factor,
            original_max_positions=original,
            attention_factor=yarn_attention_factor(factor),
            beta_fast=metadata.number(f"{_SCALING}yarn_beta_fast", 32.0),
            beta_slow=metadata.number(f"{_SCALING}yarn_beta_slow", 1.0),
        )
    if metadata.get(field) is None:
        field = "rope.scale_linear"  # in older files
    if kind == "none" or metadata.get(field) in (None, 0, 1):
        return None
    return LinearScaling(factor=metadata.number(field), original_max_positions=original)


def _recognised_scaling(
    factors: np.ndarray | None, theta: float, head_dim: int, origin: str
) -> RopeScaling | None:
    """Recognises Llama-3 scaling, of which a file keeps only the resulting factors.

    Every published model uses the same frequency bounds, so only those are tried; a file whose
    factors they do not reproduce is refused.
    """
    if factors is None:
        return None
    if factors.shape != (head_dim // 2,):
        raise CheckpointError(
            f"{origin}: {_ROPE_FACTORS}: shape {list(factors.shape)}, the head size needs [{head_dim // 2}]"
        )
    scaling = RopeScaling(
        factor=float(factors.max()), low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    )
    expected = rope_frequencies(head_dim, theta, None) / rope_frequencies(head_dim, theta, scaling)
    if not np.allclose(factors, expected.numpy(), rtol=1e-3):
        raise CheckpointError(
            f"{origin}: {_ROPE_FACTORS}: these factors are not Llama 3's scaling of "
            f"{scaling.original_max_positions} positions, the only one supported"
        )
    return None if scaling.factor == 1.0 else scaling


def _refuse_unsupported(metadata: Metadata, head_dim: int) -> None:
    for field in ("attention.value_length", "rope.dimension_count"):
        if metadata.get(field) not in (None, head_dim):
            raise metadata.error(field, f"is not supported; only the head size, {head_dim}, is")
    for field, neutral in _NEUTRAL.items():
        if metadata.get(field) not in (None, *neutral):
            raise metadata.error(field, "is not supported")
    field = "attention.scale"
    if metadata.get(field) != 0 and not math.isclose(
        metadata.number(field, head_dim**-0.5), head_dim**-0.5, rel_tol=1e-6
    ):
        raise metadata.error(field, "is not supported; only 1 / sqrt(head size) is")


def _open(path: Path) -> GGUFReader:
    try:
        return GGUFReader(path)
    # A damaged file may fail anywhere in the library's parser.
    except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path}: cannot be read as GGUF: {error}") from error


def _metadata(reader: GGUFReader, prefix: str) -> dict[str, object]:
    """The architecture's fields, without its prefix; the tokenizer's arrays are skipped."""
    return {key.removeprefix(prefix): _field(reader, key) for key in reader.fields if key.startswith(prefix)}


def _field(reader: GGUFReader, key: str) -> object:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _model_name(stored: str) -> str:
    """Hugging Face name of a tensor; an unknown one keeps its name and is reported as unexpected later."""
    layer = _LAYER_TENSOR.fullmatch(stored)
    if layer and layer[2] in _LAYER_NAMES:
        return f"layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"
    return _GLOBAL_NAMES.get(stored, stored)


def _stored_name(name: str) -> str:
    """The name a tensor would have in a file, for messages; inverse of `_model_name`."""
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name)
    names = {ours: stored for stored, ours in (_LAYER_NAMES if layer else _GLOBAL_NAMES).items()}
    if layer:
        return f"blk.{layer[1]}.{names.get(layer[2], layer[2])}.{layer[3]}"
    return names.get(name, name)


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))
