"""MTP-1 checkpoints on disk: `config.json` + `model.safetensors` in the layout of DeepSpec's drafters,
with DeepSeek-V3's names (`enorm`, `hnorm`, `eh_proj`) for the module's own tensors.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dspark_core.models import autoregressive_checkpoint as checkpoint
from dspark_core.models.config import DecoderConfig, MtpConfig
from dspark_core.models.drafter_checkpoint import check_fits_target, reaching_as_far
from dspark_core.models.drafter_config import mtp_fields, read_mtp_config
from dspark_core.models.mtp import MtpDrafter, MtpProjection, build_mtp_rotary
from dspark_core.models.shapes_only import shapes_only

_FORMAT = checkpoint.Format(
    algorithm="mtp1",
    file_prefixes={"projection.": "", "layer.": "layers.0."},
    projection="hnorm.weight",
    eagle_vocab_maps=False,
)


def load_mtp(
    directory: Path,
    target_embed: Tensor,
    target_lm_head: Tensor,
    target_config: DecoderConfig,
    dtype: torch.dtype,
) -> MtpDrafter:
    """A frozen drafter in evaluation mode.

    `target_embed` and `target_lm_head` [vocab, d] are shared unless the file has its own.

    Raises:
        CheckpointError: a file cannot be read, or does not fit its configuration or the target.
    """
    config = reaching_as_far(read_mtp_config(directory), target_config)
    check_fits_target(directory, config, target_config)
    with shapes_only():
        drafter = MtpDrafter(config, *checkpoint.blank_weights(config))
    target = checkpoint.TargetWeights(target_embed, target_lm_head)
    checkpoint.fill(drafter, directory, target, dtype, _FORMAT)
    drafter.rotary = build_mtp_rotary(config)
    return drafter


def load_mtp_projection(directory: Path, target_config: DecoderConfig, dtype: torch.dtype) -> MtpProjection:
    """Loads only the projection, as needed by a verifier. Raises CheckpointError."""
    config = read_mtp_config(directory)
    check_fits_target(directory, config, target_config)
    projection = MtpProjection(config)
    checkpoint.fill_projection(projection, directory, dtype, _FORMAT)
    return projection


def save_mtp(directory: Path, drafter: MtpDrafter, *, with_target_weights: bool = False) -> None:
    """Writes the checkpoint; `with_target_weights` adds the frozen embedding and LM head."""
    fields = mtp_fields(drafter.config)
    checkpoint.save(directory, drafter, fields, _FORMAT, with_target_weights=with_target_weights)


def mtp_fingerprint(directory: Path, config: MtpConfig) -> str:
    """Identifies the projection a verifier must apply for a drafter: geometry and projection weights."""
    return checkpoint.fingerprint(directory, config, _FORMAT)
