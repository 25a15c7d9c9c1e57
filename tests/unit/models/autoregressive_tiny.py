"""Random Eagle3 and MTP-1 drafters of the golden target, in memory and on disk."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from dspark_core.models.config import AutoregressiveConfig, Eagle3Config, MtpConfig
from dspark_core.models.eagle3 import Eagle3Drafter
from dspark_core.models.eagle3_checkpoint import save_eagle3
from dspark_core.models.mtp import MtpDrafter
from dspark_core.models.mtp_checkpoint import save_mtp
from tests.unit.models.dspark_golden import golden_target

TARGET = golden_target().config
BACKBONE = dataclasses.replace(TARGET, num_layers=1)
EAGLE3 = Eagle3Config(backbone=BACKBONE, num_target_layers=8, target_layer_ids=(1, 3, 5), block_size=4)
MTP = MtpConfig(backbone=BACKBONE, num_target_layers=8)


def random_drafter(
    config: AutoregressiveConfig, draft_vocab_ids: torch.Tensor | None = None, seed: int = 0
) -> Eagle3Drafter | MtpDrafter:
    if draft_vocab_ids is not None:
        config = dataclasses.replace(config, draft_vocab_size=len(draft_vocab_ids))
    decoder = golden_target().decoder
    embed, head = decoder.embed_tokens.weight.detach(), decoder.lm_head.weight.detach()
    head = head if draft_vocab_ids is None else head[draft_vocab_ids]
    generator = torch.Generator().manual_seed(seed)
    build = Eagle3Drafter if isinstance(config, Eagle3Config) else MtpDrafter
    drafter = build(config, embed, head, draft_vocab_ids)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.dim() == 1))
    return drafter.eval().requires_grad_(False)


def save(directory: Path, drafter: Eagle3Drafter | MtpDrafter, **options: bool) -> Path:
    if isinstance(drafter, Eagle3Drafter):
        save_eagle3(directory, drafter, **options)
    else:
        save_mtp(directory, drafter, **options)
    return directory
