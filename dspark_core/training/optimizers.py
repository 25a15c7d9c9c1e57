"""Optimisers of the master weights, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from dspark_core.errors import ConfigError
from dspark_core.training.trainer_config import TrainerConfig


def build_optimizers(
    names: Sequence[str],
    masters: Sequence[nn.Parameter],
    matrix_prefixes: tuple[str, ...],
    config: TrainerConfig,
) -> list[torch.optim.Optimizer]:
    """AdamW; with a matrix learning rate, Muon for the inner matrices. Each group stores its `peak_lr`."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, master in zip(names, masters, strict=True):
        inner = master.dim() == 2 and name.startswith(matrix_prefixes)
        (matrices if inner and config.matrix_learning_rate else others).append(master)
    group = {"params": others, "peak_lr": config.learning_rate}
    adam = torch.optim.AdamW([group], betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if not matrices:
        return [adam]
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(f"matrix_learning_rate needs torch 2.9 or later, this is {torch.__version__}")
    group = {"params": matrices, "peak_lr": config.matrix_learning_rate}
    return [adam, torch.optim.Muon([group], weight_decay=0.0, adjust_lr_fn="match_rms_adamw")]


def rate_share(config: TrainerConfig, step: int) -> float:
    """Share of the peak rate: linear warm-up, a plateau if the fractions leave room, cosine to zero."""
    warmup, decay = config.warmup_fraction * config.steps, config.decay_fraction * config.steps
    share = min(1.0, (step + 1) / max(warmup, 1.0))
    remaining = config.steps - step
    if remaining < decay:
        share *= 0.5 - 0.5 * math.cos(math.pi * remaining / decay)
    return share
