"""Selects the code that loads a drafter's checkpoint; the only place that distinguishes kinds of drafters."""

from __future__ import annotations

from pathlib import Path

import torch

from dspark_core.models.config import AnyDrafterConfig, DecoderConfig, Eagle3Config, MtpConfig
from dspark_core.models.decoder import Decoder
from dspark_core.models.drafter_checkpoint import fingerprint, load_drafter, load_projection
from dspark_core.models.drafter_config import read_any_config
from dspark_core.models.dspark import DSparkDrafter, FeatureProjection
from dspark_core.models.eagle3 import Eagle3Drafter, Eagle3Projection
from dspark_core.models.eagle3_checkpoint import eagle3_fingerprint, load_eagle3, load_eagle3_projection
from dspark_core.models.mtp import MtpDrafter, MtpProjection
from dspark_core.models.mtp_checkpoint import load_mtp, load_mtp_projection, mtp_fingerprint

AnyDrafter = DSparkDrafter | Eagle3Drafter | MtpDrafter
AnyProjection = FeatureProjection | Eagle3Projection | MtpProjection


def load_any_drafter(
    directory: Path, decoder: Decoder, target_config: DecoderConfig, dtype: torch.dtype
) -> AnyDrafter:
    """A frozen drafter of any kind, over the target's embedding and LM head.

    Raises CheckpointError.
    """
    embed, head = decoder.embed_tokens.weight, decoder.lm_head.weight
    config = read_any_config(directory)
    if isinstance(config, Eagle3Config):
        return load_eagle3(directory, embed, head, target_config, dtype)
    if isinstance(config, MtpConfig):
        return load_mtp(directory, embed, head, target_config, dtype)
    return load_drafter(directory, embed, head, target_config, dtype)


def load_any_projection(directory: Path, target_config: DecoderConfig, dtype: torch.dtype) -> AnyProjection:
    """The projection of a drafter of any kind, as needed by a verifier. Raises CheckpointError."""
    config = read_any_config(directory)
    if isinstance(config, Eagle3Config):
        return load_eagle3_projection(directory, target_config, dtype)
    if isinstance(config, MtpConfig):
        return load_mtp_projection(directory, target_config, dtype)
    return load_projection(directory, target_config, dtype)


def fingerprint_of(directory: Path, config: AnyDrafterConfig) -> str:
    """Identifies the projection a verifier must apply for a drafter. Raises CheckpointError."""
    if isinstance(config, Eagle3Config):
        return eagle3_fingerprint(directory, config)
    if isinstance(config, MtpConfig):
        return mtp_fingerprint(directory, config)
    return fingerprint(directory)
