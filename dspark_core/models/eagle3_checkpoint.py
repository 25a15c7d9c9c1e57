"""Eagle3 checkpoints on disk: `config.json` + `model.safetensors`, as DeepSpec writes them.

As with DSpark, `embed_tokens` and `lm_head` may be absent: the target has them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from dspark_core.errors import CheckpointError
from dspark_core.models.config import DecoderConfig, Eagle3Config
from dspark_core.models.drafter_checkpoint import WEIGHTS_FILE, DrafterTensors, check_fits_target
from dspark_core.models.drafter_config import read_eagle3_config
from dspark_core.models.eagle3 import Eagle3Drafter, Eagle3Projection, build_eagle3_rotary
from dspark_core.models.tensor_source import check_shapes

_EMBED, _HEAD, _FC = "embed_tokens.weight", "lm_head.weight", "fc.weight"
_FILE_PREFIXES = {"projection.": "", "layer.": "layers.0."}
"""What the file calls the modules' tensors."""


def load_eagle3(
    directory: Path,
    target_embed: Tensor,
    target_lm_head: Tensor,
    target_config: DecoderConfig,
    dtype: torch.dtype,
) -> Eagle3Drafter:
    """A frozen drafter in evaluation mode.

    `target_embed` and `target_lm_head` [vocab, d] are shared where the file has none of its own.

    Raises:
        CheckpointError: a file cannot be read, or does not fit its configuration or the target.
    """
    config = read_eagle3_config(directory)
    check_fits_target(directory, config, target_config)
    tensors = DrafterTensors(directory / WEIGHTS_FILE)
    vocabulary = (config.backbone.vocab_size, config.backbone.hidden_size)
    with torch.device("meta"):
        drafter = Eagle3Drafter(config, torch.empty(vocabulary), torch.empty(vocabulary))
    expected = {_file_name(name): tuple(value.shape) for name, value in drafter.state_dict().items()}
    frozen = {name: vocabulary for name in (_EMBED, _HEAD) if name in tensors.shapes}
    check_shapes(tensors, expected | frozen)

    state = {name: tensors.read(_file_name(name)).to(dtype) for name in drafter.state_dict()}
    drafter.load_state_dict(state, assign=True)
    embed = tensors.read(_EMBED) if _EMBED in frozen else target_embed
    head = tensors.read(_HEAD) if _HEAD in frozen else target_lm_head
    drafter.embed_tokens, drafter.lm_head = embed.detach().to(dtype), head.detach().to(dtype)
    drafter.rotary = build_eagle3_rotary(config)
    return drafter.eval().requires_grad_(False)


def load_eagle3_projection(
    directory: Path, target_config: DecoderConfig, dtype: torch.dtype
) -> Eagle3Projection:
    """What a verifier needs of a drafter; the other tensors are not read. Raises CheckpointError."""
    config = read_eagle3_config(directory)
    check_fits_target(directory, config, target_config)
    tensors = DrafterTensors(directory / WEIGHTS_FILE)
    projection = Eagle3Projection(config)
    check_shapes(tensors, {_FC: tuple(projection.fc.weight.shape)}, ignored=tensors.shapes)
    projection.load_state_dict({_FC: tensors.read(_FC)})
    return projection.to(dtype).eval().requires_grad_(False)


def eagle3_fingerprint(directory: Path, config: Eagle3Config) -> str:
    """Ties a drafter to the projection a verifier applies for it: geometry and projection weights."""
    tensors = DrafterTensors(directory / WEIGHTS_FILE)
    if _FC not in tensors.shapes:
        raise CheckpointError(f"{tensors.describe(_FC)}: missing tensor")
    geometry = {
        "algorithm": "eagle3",
        "block_size": config.block_size,
        "hidden_size": config.backbone.hidden_size,
        "vocab_size": config.backbone.vocab_size,
        "num_target_layers": config.num_target_layers,
        "target_layer_ids": config.target_layer_ids,
    }
    digest = hashlib.sha256(json.dumps(geometry, sort_keys=True).encode())
    digest.update(tensors.read(_FC).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _file_name(module_name: str) -> str:
    for ours, theirs in _FILE_PREFIXES.items():
        if module_name.startswith(ours):
            return theirs + module_name.removeprefix(ours)
    return module_name
