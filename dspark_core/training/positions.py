"""Samples the block positions of a packed batch that get losses in a step, and their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_core.training.losses import position_weights
from dspark_core.training.packing import PackedBatch
from dspark_core.training.recipe import LossConfig


@dataclass(frozen=True, slots=True)
class DrawnPositions:
    index: Tensor  # [rows] into the flattened [anchors * block], ascending
    weights: Tensor  # [rows] float32

    def to(self, device: torch.device) -> DrawnPositions:
        return DrawnPositions(self.index.to(device), self.weights.to(device))


def draw_positions(
    batch: PackedBatch, config: LossConfig, generators: Sequence[torch.Generator]
) -> DrawnPositions:
    """The counted positions; those with weight below `config.sample_below` are subsampled.

    `generators[i]` serves the i-th span of the batch.
    """
    weights = position_weights(batch.counted.shape[1], config.loss_decay)
    if config.sample_below == 0:
        kept = batch.counted
    else:
        chance = torch.cat(
            [
                torch.rand(batch.counted[span.anchors].shape, generator=generator)
                for span, generator in zip(batch.spans, generators, strict=True)
            ]
        )
        kept = batch.counted & (chance < weights / config.sample_below)
        weights = weights.clamp_min(config.sample_below)
    index = kept.flatten().nonzero()[:, 0]
    return DrawnPositions(index, weights[index % len(weights)])
