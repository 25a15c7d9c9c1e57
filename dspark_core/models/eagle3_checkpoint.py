"""Eagle3 checkpoints on disk: `config.json` + `model.safetensors`, as DeepSpec writes them.

Extension of that format: a vocabulary reduced by `draft_vocab_size` and EAGLE-3's own `d2t` and `t2d`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dspark_core.models import autoregressive_checkpoint as checkpoint
from dspark_core.models.config import DecoderConfig, Eagle3Config
from dspark_core.models.drafter_checkpoint import check_fits_target, reaching_as_far
from dspark_core.models.drafter_config import eagle3_fields, read_eagle3_config
from dspark_core.models.eagle3 import Eagle3Drafter, Eagle3Projection, build_eagle3_rotary
from dspark_core.models.shapes_only import shapes_only

_FORMAT = checkpoint.Format(
    algorithm="eagle3",
    file_prefixes={"projection.": "", "layer.": "layers.0."},
    projection="fc.weight",
    eagle_vocab_maps=True,
)


def load_eagle3(
    directory: Path,
    target_embed: Tensor,
    target_lm_head: Tensor,
    target_config: DecoderConfig,
    dtype: torch.dtype,
) -> Eagle3Drafter:
    """A frozen drafter in evaluation mode.

    `target_embed` and `target_lm_head` [vocab, d] are shared unless the file has its own.

    Raises:
        CheckpointError: a file cannot be read, or does not fit its configuration or the target.
    """
    config = reaching_as_far(read_eagle3_config(directory), target_config)
    check_fits_target(directory, config, target_config)
    with shapes_only():
        drafter = Eagle3Drafter(config, *checkpoint.blank_weights(config))
    target = checkpoint.TargetWeights(target_embed, target_lm_head)
    checkpoint.fill(drafter, directory, target, dtype, _FORMAT)
    drafter.rotary = build_eagle3_rotary(config)
    return drafter


def load_eagle3_projection(
    directory: Path, target_config: DecoderConfig, dtype: torch.dtype
) -> Eagle3Projection:
    """Loads only the projection, as needed by a verifier. Raises CheckpointError."""
    config = read_eagle3_config(directory)
    check_fits_target(directory, config, target_config)
    projection = Eagle3Projection(config)
    checkpoint.fill_projection(projection, directory, dtype, _FORMAT)
    return projection


def save_eagle3(directory: Path, drafter: Eagle3Drafter, *, with_target_weights: bool = False) -> None:
    """Writes the checkpoint; `with_target_weights` adds the frozen embedding and LM head."""
    fields = eagle3_fields(drafter.config)
    checkpoint.save(directory, drafter, fields, _FORMAT, with_target_weights=with_target_weights)


def eagle3_fingerprint(directory: Path, config: Eagle3Config) -> str:
    """Identifies the projection a verifier must apply for a drafter: geometry and projection weights."""
    return checkpoint.fingerprint(directory, config, _FORMAT)
