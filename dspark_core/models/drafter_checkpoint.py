"""Drafter checkpoints on disk: `config.json` + `model.safetensors`, as DeepSpec writes them.

Two extensions of that format: `embed_tokens` and `lm_head` may be absent (they are frozen and
the target has them), and `draft_vocab_ids` maps a reduced draft vocabulary to target token ids.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from dspark_core.errors import CheckpointError
from dspark_core.models.config import AnyDrafterConfig, DecoderConfig, DrafterConfig
from dspark_core.models.drafter_config import CONFIG_FILE, drafter_fields, read_drafter_config
from dspark_core.models.dspark import DSparkDrafter, FeatureProjection, build_dspark_rotary
from dspark_core.models.shapes_only import shapes_only
from dspark_core.models.tensor_files import open_tensors, save_tensors
from dspark_core.models.tensor_source import check_shapes, checked_finite

WEIGHTS_FILE = "model.safetensors"
_EMBED, _HEAD, _VOCAB = "embed_tokens.weight", "lm_head.weight", "draft_vocab_ids"
_PROJECTION = ("fc.weight", "hidden_norm.weight")
_PROJECTION_PREFIX = "projection."
_ZERO_IF_ABSENT = ("markov_head.gate_proj.bias", "markov_head.joint_proj.bias")
_INTEGER_DTYPES = (torch.int32, torch.int64)
_INTEGER_TENSORS = (_VOCAB, "d2t")
"""Maps of a reduced draft vocabulary: this project's and EAGLE-3's."""

Config = TypeVar("Config", bound=AnyDrafterConfig)


def load_drafter(
    directory: Path,
    target_embed: Tensor,
    target_lm_head: Tensor,
    target_config: DecoderConfig,
    dtype: torch.dtype,
) -> DSparkDrafter:
    """A frozen drafter in evaluation mode.

    `target_embed` and `target_lm_head` [vocab, d] are shared unless the file has its own.

    Raises:
        CheckpointError: a file cannot be read, or does not fit its configuration or the target.
    """
    config = reaching_as_far(read_drafter_config(directory), target_config)
    check_fits_target(directory, config, target_config)
    tensors = DrafterTensors(directory / WEIGHTS_FILE)
    with shapes_only():
        drafter = _blank(config)
    expected = {_file_name(name): tuple(value.shape) for name, value in drafter.state_dict().items()}
    absent = {name for name in _ZERO_IF_ABSENT if name in expected and name not in tensors.shapes}
    required = {name: shape for name, shape in expected.items() if name not in absent}
    frozen = {name: shape for name, shape in _frozen_shapes(config).items() if name in tensors.shapes}
    check_shapes(tensors, required | frozen)

    state = {name: tensors.read(name) for name in required}
    state |= {name: torch.zeros(expected[name]) for name in absent}
    vocab_ids = state.get(_VOCAB)
    if vocab_ids is not None:
        vocab_ids = state[_VOCAB] = checked_vocab_ids(tensors, vocab_ids, config)
    embed = tensors.read(_EMBED) if _EMBED in frozen else target_embed
    if _HEAD in frozen:
        head = tensors.read(_HEAD)
    else:
        head = target_lm_head if vocab_ids is None else target_lm_head[vocab_ids.to(target_lm_head.device)]
    weights = {
        _module_name(name): value if name == _VOCAB else value.to(dtype) for name, value in state.items()
    }
    drafter.load_state_dict(weights, assign=True)
    drafter.embed_tokens, drafter.lm_head = embed.detach().to(dtype), head.detach().to(dtype)
    drafter.rotary = build_dspark_rotary(config)
    return drafter.eval().requires_grad_(False)


def load_projection(directory: Path, target_config: DecoderConfig, dtype: torch.dtype) -> FeatureProjection:
    """Loads only the projection, as needed by a verifier. Raises CheckpointError."""
    config = read_drafter_config(directory)
    check_fits_target(directory, config, target_config)
    tensors = DrafterTensors(directory / WEIGHTS_FILE)
    projection = FeatureProjection(config)
    state = projection.state_dict()
    check_shapes(tensors, {name: tuple(value.shape) for name, value in state.items()}, ignored=tensors.shapes)
    projection.load_state_dict({name: tensors.read(name) for name in state})
    return projection.to(dtype).eval().requires_grad_(False)


def fingerprint(directory: Path) -> str:
    """Identifies the projection a verifier must apply for a drafter: geometry and projection weights."""
    config = read_drafter_config(directory)
    tensors = DrafterTensors(directory / WEIGHTS_FILE)
    geometry = {
        "block_size": config.block_size,
        "hidden_size": config.backbone.hidden_size,
        "vocab_size": config.backbone.vocab_size,
        "num_target_layers": config.num_target_layers,
        "target_layer_ids": config.target_layer_ids,
        "context_window": config.context_window,
    }
    digest = hashlib.sha256(json.dumps(geometry, sort_keys=True).encode())
    for name in _PROJECTION:
        if name not in tensors.shapes:
            raise CheckpointError(f"{tensors.describe(name)}: missing tensor")
        digest.update(tensors.read(name).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_drafter(directory: Path, drafter: DSparkDrafter, *, with_target_weights: bool = False) -> None:
    """Writes the checkpoint; `with_target_weights` adds the frozen embedding and LM head."""
    state = {_file_name(name): value.contiguous() for name, value in drafter.state_dict().items()}
    if _VOCAB in state:
        state[_VOCAB] = state[_VOCAB].to(torch.int32)
    if with_target_weights:
        state |= {_EMBED: drafter.embed_tokens.contiguous(), _HEAD: drafter.lm_head.contiguous()}
    directory.mkdir(parents=True, exist_ok=True)
    save_tensors(state, directory / WEIGHTS_FILE)
    dtype = str(drafter.norm.weight.dtype).removeprefix("torch.")
    fields = drafter_fields(drafter.config) | {"dtype": dtype}
    (directory / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def check_fits_target(directory: Path, config: AnyDrafterConfig, target: DecoderConfig) -> None:
    """Raises CheckpointError naming the field and both values if drafter and target differ."""
    pairs = {
        "num_target_layers": (config.num_target_layers, target.num_layers),
        "vocab_size": (config.backbone.vocab_size, target.vocab_size),
        "hidden_size": (config.backbone.hidden_size, target.hidden_size),
    }
    for field, (found, needed) in pairs.items():
        if found != needed:
            raise CheckpointError(
                f"{directory / CONFIG_FILE}: {field}={found} does not fit the target, which has {needed}"
            )


def reaching_as_far(config: Config, target: DecoderConfig) -> Config:
    """Extends the maximum context to the target's: a checkpoint trained on short texts may state less, and an
    index past the RoPE tables is a fatal error on a GPU."""
    longest = max(config.backbone.max_context_tokens, target.max_context_tokens)
    backbone = dataclasses.replace(config.backbone, max_context_tokens=longest)
    return dataclasses.replace(config, backbone=backbone)


class DrafterTensors:
    """`TensorSource` over one safetensors file: float tensors and integer vocabulary maps."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with open_tensors(path) as file:
                names = list(file.keys())
                self._shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def describe(self, name: str) -> str:
        return f"{self._path}: {name}"

    def read(self, name: str) -> Tensor:
        try:
            with open_tensors(self._path) as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.describe(name)}: cannot be read: {error}") from error
        if (name in _INTEGER_TENSORS) != (tensor.dtype in _INTEGER_DTYPES) or tensor.dtype is torch.bool:
            raise CheckpointError(f"{self.describe(name)}: dtype {tensor.dtype} is not supported")
        return checked_finite(self, name, tensor)


def _blank(config: DrafterConfig) -> DSparkDrafter:
    shapes = _frozen_shapes(config)
    vocab = config.draft_vocab_size
    vocab_ids = None if vocab is None else torch.empty(vocab, dtype=torch.int64)
    return DSparkDrafter(config, torch.empty(shapes[_EMBED]), torch.empty(shapes[_HEAD]), vocab_ids)


def _frozen_shapes(config: DrafterConfig) -> dict[str, tuple[int, ...]]:
    backbone = config.backbone
    return {
        _EMBED: (backbone.vocab_size, backbone.hidden_size),
        _HEAD: (config.output_size, backbone.hidden_size),
    }


def checked_vocab_ids(tensors: DrafterTensors, ids: Tensor, config: AnyDrafterConfig) -> Tensor:
    """ids [draft vocab] -> the same as int64. Raises CheckpointError for ids out of range or repeated."""
    vocab = config.backbone.vocab_size
    if int(ids.min()) < 0 or int(ids.max()) >= vocab:
        raise CheckpointError(f"{tensors.describe(_VOCAB)}: ids must be in [0, vocab_size={vocab})")
    if len(set(ids.tolist())) != len(ids):
        raise CheckpointError(f"{tensors.describe(_VOCAB)}: ids must not repeat")
    return ids.long()


def _file_name(module_name: str) -> str:
    return module_name.removeprefix(_PROJECTION_PREFIX)


def _module_name(file_name: str) -> str:
    return _PROJECTION_PREFIX + file_name if file_name in _PROJECTION else file_name
