"""Common code for checkpoints of Eagle3 and MTP-1 drafters: a module, its tensors in one file, and an
optional reduced draft vocabulary. A `Format` describes the differences.

As with DSpark, `embed_tokens` and `lm_head` may be absent, since the target has them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from dspark_core.errors import CheckpointError
from dspark_core.models.config import AutoregressiveConfig
from dspark_core.models.drafter_checkpoint import WEIGHTS_FILE, DrafterTensors, checked_vocab_ids
from dspark_core.models.drafter_config import CONFIG_FILE
from dspark_core.models.eagle3 import Eagle3Drafter
from dspark_core.models.mtp import MtpDrafter
from dspark_core.models.tensor_files import save_tensors
from dspark_core.models.tensor_source import check_shapes

_EMBED, _HEAD, _VOCAB = "embed_tokens.weight", "lm_head.weight", "draft_vocab_ids"
_OFFSETS, _MASK = "d2t", "t2d"
"""EAGLE-3's maps: offset from a draft index to its target id; mask of target ids that can be drafted."""

Drafter = TypeVar("Drafter", Eagle3Drafter, MtpDrafter)


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    algorithm: str
    file_prefixes: Mapping[str, str]
    """Maps module name prefixes to those in the file."""
    projection: str
    """The one tensor a verifier needs, by its name in the file."""
    eagle_vocab_maps: bool
    """Whether a reduced draft vocabulary is written as EAGLE-3's `d2t` and `t2d`; either form can be read."""

    def file_name(self, module_name: str) -> str:
        for ours, theirs in self.file_prefixes.items():
            if module_name.startswith(ours):
                return theirs + module_name.removeprefix(ours)
        return module_name


@dataclass(frozen=True, slots=True)
class TargetWeights:
    """Weights that a drafter shares with its target."""

    embed_tokens: Tensor  # [vocab, d]
    lm_head: Tensor  # [vocab, d]


def blank_weights(config: AutoregressiveConfig) -> tuple[Tensor, Tensor, Tensor | None]:
    """Embedding, LM head and vocabulary map of the right shapes, for a module on the meta device."""
    size, vocab = config.backbone.hidden_size, config.draft_vocab_size
    ids = None if vocab is None else torch.empty(vocab, dtype=torch.int64)
    return torch.empty(config.backbone.vocab_size, size), torch.empty(config.output_size, size), ids


def fill(
    drafter: Drafter, directory: Path, target: TargetWeights, dtype: torch.dtype, layout: Format
) -> Drafter:
    """Loads a checkpoint into a module on the meta device; frozen, in evaluation mode.

    Raises CheckpointError if the file cannot be read or does not fit the module.
    """
    config, tensors = drafter.config, DrafterTensors(directory / WEIGHTS_FILE)
    expected = {
        layout.file_name(name): tuple(value.shape)
        for name, value in drafter.state_dict().items()
        if name != _VOCAB
    }
    optional = {
        _EMBED: (config.backbone.vocab_size, config.backbone.hidden_size),
        _HEAD: (config.output_size, config.backbone.hidden_size),
    }
    frozen = {name: shape for name, shape in optional.items() if name in tensors.shapes}
    check_shapes(tensors, expected | frozen | _vocab_shapes(config, tensors), ignored=(_MASK,))
    state = {
        name: tensors.read(layout.file_name(name)).to(dtype)
        for name in drafter.state_dict()
        if name != _VOCAB
    }
    ids = _vocab_ids(config, tensors)
    if ids is not None:
        state[_VOCAB] = ids
    drafter.load_state_dict(state, assign=True)
    embed = tensors.read(_EMBED) if _EMBED in frozen else target.embed_tokens
    if _HEAD in frozen:
        head = tensors.read(_HEAD)
    else:
        head = target.lm_head if ids is None else target.lm_head[ids.to(target.lm_head.device)]
    drafter.embed_tokens, drafter.lm_head = embed.detach().to(dtype), head.detach().to(dtype)
    return drafter.eval().requires_grad_(False)


def fill_projection(projection: nn.Module, directory: Path, dtype: torch.dtype, layout: Format) -> None:
    """Loads only the projection, as needed by a verifier. Raises CheckpointError."""
    tensors = DrafterTensors(directory / WEIGHTS_FILE)
    (name, weight), *others = projection.state_dict().items()
    assert not others, "a projection is one tensor"
    check_shapes(tensors, {layout.projection: tuple(weight.shape)}, ignored=tensors.shapes)
    projection.load_state_dict({name: tensors.read(layout.projection)})
    projection.to(dtype).eval().requires_grad_(False)


def save(
    directory: Path,
    drafter: Eagle3Drafter | MtpDrafter,
    fields: Mapping[str, object],
    layout: Format,
    *,
    with_target_weights: bool,
) -> None:
    """Writes both files; `with_target_weights` adds the frozen embedding and LM head."""
    weights = drafter.state_dict()
    ids = weights.pop(_VOCAB, None)
    state = {layout.file_name(name): value.contiguous() for name, value in weights.items()}
    if ids is not None and layout.eagle_vocab_maps:
        mask = torch.zeros(drafter.config.backbone.vocab_size, dtype=torch.bool)
        mask[ids] = True
        state |= {_OFFSETS: ids - torch.arange(len(ids)), _MASK: mask}
    elif ids is not None:
        state[_VOCAB] = ids.to(torch.int32)
    if with_target_weights:
        state |= {_EMBED: drafter.embed_tokens.contiguous(), _HEAD: drafter.lm_head.contiguous()}
    directory.mkdir(parents=True, exist_ok=True)
    save_tensors(state, directory / WEIGHTS_FILE)
    dtype = str(drafter.norm.weight.dtype).removeprefix("torch.")
    text = json.dumps({**fields, "dtype": dtype}, indent=2)
    (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def fingerprint(directory: Path, config: AutoregressiveConfig, layout: Format) -> str:
    """Identifies the projection a verifier must apply for a drafter: geometry and projection weights."""
    tensors = DrafterTensors(directory / WEIGHTS_FILE)
    if layout.projection not in tensors.shapes:
        raise CheckpointError(f"{tensors.describe(layout.projection)}: missing tensor")
    geometry = {
        "algorithm": layout.algorithm,
        "block_size": config.block_size,
        "hidden_size": config.backbone.hidden_size,
        "vocab_size": config.backbone.vocab_size,
        "num_target_layers": config.num_target_layers,
        "target_layer_ids": config.target_layer_ids,
    }
    digest = hashlib.sha256(json.dumps(geometry, sort_keys=True).encode())
    digest.update(tensors.read(layout.projection).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _vocab_shapes(config: AutoregressiveConfig, tensors: DrafterTensors) -> dict[str, tuple[int, ...]]:
    if config.draft_vocab_size is None:
        return {}
    name = _OFFSETS if _OFFSETS in tensors.shapes else _VOCAB
    return {name: (config.draft_vocab_size,)}


def _vocab_ids(config: AutoregressiveConfig, tensors: DrafterTensors) -> Tensor | None:
    """[draft vocab] int64"""
    if config.draft_vocab_size is None:
        return None
    if _OFFSETS not in tensors.shapes:
        return checked_vocab_ids(tensors, tensors.read(_VOCAB), config)
    offsets = tensors.read(_OFFSETS).long()
    return checked_vocab_ids(tensors, offsets + torch.arange(len(offsets)), config)
