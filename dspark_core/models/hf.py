"""Hugging Face model directories: `config.json` plus safetensors files, sharded or not."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from dspark_core.errors import CheckpointError
from dspark_core.kernels.matrix import QuantizedRows
from dspark_core.models.config import DecoderConfig, Family
from dspark_core.models.gemma_hf import gemma_decoder_config
from dspark_core.models.metadata import Metadata, naming_file
from dspark_core.models.rope_layouts import read_rope_scaling, refuse_another_theta, refuse_disagreement
from dspark_core.models.rope_scaling import reach
from dspark_core.models.tensor_files import open_tensors
from dspark_core.models.tensor_source import checked_finite

ARCHITECTURES = {
    "LlamaForCausalLM": Family.LLAMA,
    "Qwen3ForCausalLM": Family.QWEN3,
    "Gemma3ForCausalLM": Family.GEMMA3,
    "Gemma3ForConditionalGeneration": Family.GEMMA3,
    "Gemma4ForCausalLM": Family.GEMMA4,
    "Gemma4ForConditionalGeneration": Family.GEMMA4,
    "Gemma4UnifiedForCausalLM": Family.GEMMA4,
    "Gemma4UnifiedForConditionalGeneration": Family.GEMMA4,
}

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
_PREFIX = "model."
_TEXT_CONFIG = "text_config"
_TEXT_PREFIXES = ("model.language_model.", "language_model.model.")
"""Prefixes of the text decoder's tensors in multimodal checkpoints, newest layout first."""


def read_hf_config(directory: Path, *, quantised: bool = False) -> DecoderConfig:
    """Configuration of the text decoder. Raises CheckpointError for what it does not support.

    `quantised`: whether the caller's engine also handles quantised weights.
    """
    path = directory / "config.json"
    metadata = Metadata(str(path), read_json(path))
    architectures = metadata.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    for name in names:
        if name in ARCHITECTURES:
            return decoder_config(_text_part(metadata), ARCHITECTURES[name], quantised=quantised)
    raise metadata.error("architectures", f"is not supported; supported: {', '.join(ARCHITECTURES)}")


def has_text_part(directory: Path) -> bool:
    """Whether the checkpoint holds more than a text decoder."""
    return read_json(directory / "config.json").get(_TEXT_CONFIG) is not None


def _text_part(metadata: Metadata) -> Metadata:
    values = metadata.get(_TEXT_CONFIG)
    if values is None:
        return metadata
    if not isinstance(values, dict):
        raise metadata.error(_TEXT_CONFIG, "must be an object")
    # Settings of the whole model also apply to its text part.
    shared = ("quantization_config", "tie_word_embeddings")
    outer = {field: metadata.get(field) for field in shared if metadata.get(field) is not None}
    return Metadata(f"{metadata.origin}: {_TEXT_CONFIG}", {**values, **outer})


def decoder_config(metadata: Metadata, family: Family, *, quantised: bool = False) -> DecoderConfig:
    """The decoder's geometry from `config.json` fields, in the old or new layout of the RoPE settings.

    Raises:
        CheckpointError: a field is missing, invalid, or asks for an unsupported feature.
    """
    if metadata.get("quantization_config") is not None and not quantised:
        raise metadata.error(
            "quantization_config", "is not supported; give unquantised weights or a GGUF file"
        )
    if family in (Family.GEMMA3, Family.GEMMA4):
        return gemma_decoder_config(metadata, family)
    _refuse_unsupported(metadata)
    hidden_size, num_heads = metadata.integer("hidden_size"), metadata.integer("num_attention_heads")
    rope = _rope_fields(metadata)
    with naming_file(metadata.origin):
        scaling = read_rope_scaling(rope, metadata)
        return DecoderConfig(
            family=family,
            vocab_size=metadata.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=metadata.integer("intermediate_size"),
            num_layers=metadata.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=metadata.integer("num_key_value_heads", num_heads),
            head_dim=metadata.integer(
                "head_dim", 128 if family is Family.QWEN3 else hidden_size // num_heads
            ),
            rms_norm_eps=metadata.number("rms_norm_eps", 1e-6),
            rope_theta=rope.number("rope_theta", 10000.0),
            max_context_tokens=reach(scaling, metadata.integer("max_position_embeddings")),
            rope_scaling=scaling,
            tie_word_embeddings=metadata.flag("tie_word_embeddings", False),
            qk_norm=family is Family.QWEN3,
            attention_bias=metadata.flag("attention_bias", False),
        )


class HfTensors:
    """`TensorSource` over the safetensors files of a directory; reads only headers up front."""

    def __init__(self, directory: Path, *, text_part: bool = False, any_dtype: bool = False) -> None:
        """`text_part`: the directory holds more than a text decoder; other tensors are ignored.
        `any_dtype`: non-float tensors are ignored rather than refused."""
        self._directory = directory
        self._text_part = text_part
        self._any_dtype = any_dtype
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        self._stored_names: dict[str, str] = {}
        weight_map = _weight_map(directory / _INDEX)
        for path in _files(directory, weight_map):
            self._add_file(path)
        for stored, file_name in (weight_map or {}).items():
            name = self._name(stored)
            if name is None or self._any_dtype:
                continue
            if self._files.get(name) != directory / file_name:
                raise CheckpointError(
                    f"{directory / file_name}: missing tensor {stored}, which {_INDEX} promises"
                )

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def describe(self, name: str) -> str:
        prefix = _TEXT_PREFIXES[0] if self._text_part else _PREFIX
        stored = self._stored_names.get(name, name if name.startswith("lm_head") else prefix + name)
        return f"{self._files.get(name, self._directory)}: {stored}"

    def read(self, name: str) -> Tensor:
        try:
            with open_tensors(self._files[name]) as file:
                tensor: Tensor = file.get_tensor(self._stored_names[name])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.describe(name)}: cannot be read: {error}") from error
        return checked_finite(self, name, tensor)

    def read_start(self, name: str, values: int) -> Tensor:
        """The first values of the flattened tensor, without reading the rest."""
        rows = -(-values // max(math.prod(self._shapes[name][1:]), 1))
        try:
            with open_tensors(self._files[name]) as file:
                start: Tensor = file.get_slice(self._stored_names[name])[:rows]
                return start.flatten()[:values]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.describe(name)}: cannot be read: {error}") from error

    def read_quantized(self, name: str) -> QuantizedRows | None:
        """Always None: safetensors files hold floats."""
        return None

    def _add_file(self, path: Path) -> None:
        try:
            with open_tensors(path) as file:
                for stored in file.keys():  # noqa: SIM118 - not a dict
                    view = file.get_slice(stored)
                    self._add_tensor(path, stored, view.get_shape(), view.get_dtype())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error

    def _add_tensor(self, path: Path, stored: str, shape: list[int], dtype: str) -> None:
        name = self._name(stored)
        if name is None or stored.endswith("rotary_emb.inv_freq"):
            return  # old exports contain this constant
        if dtype not in _FLOAT_DTYPES:
            if self._any_dtype:
                return
            raise CheckpointError(
                f"{path}: {stored}: dtype {dtype} is not supported; supported: {', '.join(_FLOAT_DTYPES)}"
            )
        if name in self._files:
            raise CheckpointError(f"{path}: {stored}: the tensor is also in {self._files[name]}")
        self._shapes[name], self._files[name], self._stored_names[name] = tuple(shape), path, stored

    def _name(self, stored: str) -> str | None:
        """None: not part of the text decoder."""
        if not self._text_part:
            return stored.removeprefix(_PREFIX)
        for prefix in _TEXT_PREFIXES:
            if stored.startswith(prefix):
                return stored.removeprefix(prefix)
        head = stored.removeprefix("language_model.")
        return head if head.startswith("lm_head.") else None


def read_json(path: Path) -> dict[str, object]:
    """Raises CheckpointError unless the file holds a JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return values


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, which may not exist. Raises CheckpointError for a bad index."""
    return _files(directory, _weight_map(directory / _INDEX))


def _files(directory: Path, weight_map: Mapping[str, str] | None) -> list[Path]:
    names = [_WEIGHTS] if weight_map is None else sorted(set(weight_map.values()))
    return [directory / name for name in names]


def _weight_map(index: Path) -> dict[str, str] | None:
    """None if there is no index."""
    if not index.is_file():
        return None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: weight_map is missing")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(f"{index}: weight_map[{name!r}]={file_name!r} is not a file name")
    return weight_map


def _refuse_unsupported(metadata: Metadata) -> None:
    if metadata.get("hidden_act") not in (None, "silu"):
        raise metadata.error("hidden_act", "is not supported; supported: 'silu'")
    for field in ("mlp_bias", "use_sliding_window"):
        if metadata.flag(field, False):
            raise metadata.error(field, "is not supported")
    layer_types = metadata.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types)
    ):
        raise metadata.error("layer_types", "is not supported; supported: 'full_attention' throughout")
    # Qwen3 writes a window even if use_sliding_window says it is unused.
    if metadata.get("use_sliding_window") is None and metadata.get("sliding_window") is not None:
        raise metadata.error("sliding_window", "is not supported")


def _rope_fields(metadata: Metadata) -> Metadata:
    """The RoPE settings from either layout: `rope_parameters`, or `rope_theta` and `rope_scaling`."""
    values: dict[str, object] = {"rope_theta": metadata.get("rope_theta")}
    field = "rope_parameters" if metadata.get("rope_parameters") is not None else "rope_scaling"
    nested = metadata.get(field)
    if nested is not None and not isinstance(nested, dict):
        raise metadata.error(field, "must be an object")
    if field == "rope_parameters" and nested is not None:
        refuse_disagreement(metadata, nested)
    refuse_another_theta(metadata, "rope_theta", nested or {}, field)
    values |= {name: value for name, value in (nested or {}).items() if value is not None}
    values.setdefault("partial_rotary_factor", metadata.get("partial_rotary_factor"))
    rope = Metadata(f"{metadata.origin}: {field}" if nested else metadata.origin, values)
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise rope.error("partial_rotary_factor", "is not supported; supported: 1.0")
    return rope
