"""Loads a target model from a GGUF file or a Hugging Face directory, validating every tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dspark_core.errors import CheckpointError, ConfigError
from dspark_core.kernels.matrix import QuantizedRows
from dspark_core.model_paths import resolve_model_path
from dspark_core.models.config import DecoderConfig, draft_backbone
from dspark_core.models.decoder import Decoder
from dspark_core.models.gemma import build_decoder
from dspark_core.models.gguf import GgufCheckpoint
from dspark_core.models.hf import HfTensors, has_text_part, read_hf_config
from dspark_core.models.packing import PackingPlan, WeightChoice, takes_int8
from dspark_core.models.shapes_only import shapes_only
from dspark_core.models.tensor_source import WeightSource, check_shapes
from dspark_core.models.weight_layout import Layout, SourceTensor, unused_tensors, weight_layout

_FINGERPRINT_VALUES = 64
"""Number of values of each tensor that enter the fingerprint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFacts:
    """What is known about a target without loading its weights."""

    config: DecoderConfig
    path: Path
    fingerprint: str
    """Equal for equal weights in the same format, regardless of the dtype or device they are loaded to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTarget(TargetFacts):
    decoder: Decoder
    """Frozen, in evaluation mode."""


def load_target(
    path: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    pack: bool = True,
    weights: WeightChoice = WeightChoice.STORED,
    native: bool = True,
) -> LoadedTarget:
    """`path` is a file, a directory, or the demo model's name; `pack` as in `Decoder.pack`, on a CPU only.

    `weights` and `native` control the packing.

    Raises:
        ConfigError: `path` does not exist, or does not hold what `weights` requires.
        CheckpointError: names the file, the tensor and both shapes where they apply.
    """
    resolved = resolve_model_path(path)
    config, source = _open_checkpoint(resolved)
    layout = weight_layout(config)
    check_shapes(source, _shapes(layout), ignored=unused_tensors(config))
    decoder = _empty_decoder(config, dtype, device)
    fingerprint = _filled(decoder, layout, source)
    if pack and torch.device(device).type == "cpu":
        stored = _stored_matrices(source, layout) if weights.keeps_blocks else {}
        if weights is WeightChoice.STORED_A8 and not stored:
            raise ConfigError(f"weights stored-a8 are for quantised files: {resolved} holds no such blocks")
        if weights is WeightChoice.INT8 and not takes_int8(decoder):
            raise ConfigError(
                f"weights int8 need inputs in multiples of 32: no matrix of {resolved} has them"
            )
        decoder.pack(PackingPlan(weights=weights, stored=stored, native=native))
    return LoadedTarget(decoder=decoder, config=config, path=resolved, fingerprint=fingerprint)


def load_target_ends(path: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> LoadedTarget:
    """Loads only the embedding and output projection, which a drafter shares with its target, as a decoder
    without layers. Layers may be quantised in any way. Raises as `load_target`."""
    resolved = resolve_model_path(path)
    config, source = _open_checkpoint(resolved, layers=False)
    ends = draft_backbone(config, 0)
    layout = weight_layout(ends)
    shapes = _shapes(layout)
    check_shapes(source, shapes, ignored=[name for name in source.shapes if name not in shapes])
    decoder = _empty_decoder(ends, dtype, device)
    fingerprint = _filled(decoder, layout, source)
    return LoadedTarget(decoder=decoder, config=config, path=resolved, fingerprint=fingerprint)


def _shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    return {part.name: part.shape for parts in layout.values() for part in parts}


def _filled(decoder: Decoder, layout: Layout, source: WeightSource) -> str:
    """Reads every parameter; returns the fingerprint of the values read."""
    fingerprint = _geometry_digest(decoder.config)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            for part, rows in _row_ranges(layout[name], parameter):
                values = source.read(part.name)
                fingerprint.update(values.flatten()[:_FINGERPRINT_VALUES].float().numpy().tobytes())
                rows.copy_(values)
    return fingerprint.hexdigest()[:16]


def _geometry_digest(config: DecoderConfig) -> hashlib._Hash:
    digest = hashlib.sha256(repr(config).encode())
    if config.gemma is not None:
        digest.update(repr(config.gemma).encode())
    return digest


def read_target_facts(path: str) -> TargetFacts:
    """Facts of a Hugging Face directory that another engine loads; quantised matrices are not fingerprinted.

    Raises ConfigError and CheckpointError as `load_target`.
    """
    resolved = resolve_model_path(path)
    if not resolved.is_dir():
        raise ConfigError(f"target {str(resolved)!r} must be a Hugging Face directory for this engine")
    config = read_hf_config(resolved, quantised=True)
    source = HfTensors(resolved, text_part=has_text_part(resolved), any_dtype=True)
    fingerprint = _geometry_digest(config)
    for parts in _in_parameter_order(config):
        for part in parts:
            if source.shapes.get(part.name) == part.shape:
                values = source.read_start(part.name, _FINGERPRINT_VALUES)
                fingerprint.update(values.float().numpy().tobytes())
    return TargetFacts(config=config, path=resolved, fingerprint=fingerprint.hexdigest()[:16])


def _in_parameter_order(config: DecoderConfig) -> Iterator[tuple[SourceTensor, ...]]:
    layout = weight_layout(config)
    with shapes_only():
        decoder = build_decoder(config)
    decoder.tie_weights()
    for name, _ in decoder.named_parameters():
        yield layout[name]


def _open_checkpoint(path: Path, *, layers: bool = True) -> tuple[DecoderConfig, WeightSource]:
    """`layers`: whether layers are computed here and so must be of a supported kind."""
    if path.is_dir():
        config = read_hf_config(path, quantised=not layers)
        tensors = HfTensors(path, text_part=has_text_part(path), any_dtype=not layers)
        _refuse_another_head(config, tensors)
        return config, tensors
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: give the directory that holds it and config.json")
    checkpoint = GgufCheckpoint(path)
    return checkpoint.config, checkpoint


def _refuse_another_head(config: DecoderConfig, source: HfTensors) -> None:
    """Refuses a tied model with a separate output projection: a copy is fine, other weights would be lost."""
    head, embedding = "lm_head.weight", "embed_tokens.weight"
    # A missing embedding is reported later, with other missing tensors.
    if not config.tie_word_embeddings or not {head, embedding} <= source.shapes.keys():
        return
    if not torch.equal(source.read(head), source.read(embedding)):
        raise CheckpointError(
            f"{source.describe(head)}: is not the embedding, which tie_word_embeddings=True says it is: "
            "set that to false, or leave the tensor out"
        )


def _stored_matrices(source: WeightSource, layout: Layout) -> dict[str, QuantizedRows]:
    """Parameters whose parts are all stored in the same quantised format."""
    found = {}
    for name, parts in layout.items():
        matrices = [source.read_quantized(part.name) for part in parts]
        kept = [matrix for matrix in matrices if matrix is not None]
        if len(kept) == len(parts) and len({matrix.format for matrix in kept}) == 1:
            blocks = torch.cat([matrix.blocks for matrix in kept])
            found[name] = QuantizedRows(kept[0].format, blocks, kept[0].inputs)
    return found


def _empty_decoder(config: DecoderConfig, dtype: torch.dtype, device: torch.device | str) -> Decoder:
    """Leaves weights uninitialised: random initialisation takes longer than reading the file."""
    with shapes_only():
        decoder = build_decoder(config)
    decoder = decoder.to(dtype).to_empty(device=device)
    decoder.build_rotary(device)
    decoder.tie_weights()
    return decoder.requires_grad_(False).eval()


def _row_ranges(parts: tuple[SourceTensor, ...], parameter: Tensor) -> Iterator[tuple[SourceTensor, Tensor]]:
    """Each source with the rows of the parameter it fills; sources are stacked from the top."""
    start = 0
    for part in parts:
        yield part, parameter.narrow(0, start, part.rows)
        start += part.rows
