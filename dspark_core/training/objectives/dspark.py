"""DSpark's training objective (paper, training section), and DFlash's: the same without heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dspark_core.models.config import DrafterConfig
from dspark_core.models.drafter_checkpoint import save_drafter
from dspark_core.models.dspark import DSparkDrafter
from dspark_core.models.loading import LoadedTarget
from dspark_core.training.block_attention import packed_hidden
from dspark_core.training.dropout import drop_spans
from dspark_core.training.features import FeatureSequence
from dspark_core.training.initial import new_drafter
from dspark_core.training.losses import (
    OUTSIDE_DRAFT_VOCAB,
    BlockLosses,
    block_losses,
    position_weights,
    target_probabilities,
)
from dspark_core.training.objectives.protocol import ObjectiveReport, Total
from dspark_core.training.packing import PackedBatch, draw_anchors, pack
from dspark_core.training.recipe import DrafterRecipe, LossConfig


def build_dspark(
    recipe: DrafterRecipe, losses: LossConfig, target: LoadedTarget, draft_vocab_ids: Tensor | None
) -> DSparkObjective:
    config = DrafterConfig(
        backbone=dataclasses.replace(target.config, num_layers=recipe.num_layers),
        num_target_layers=target.config.num_layers,
        target_layer_ids=recipe.target_layer_ids,
        block_size=recipe.block_size,
        mask_token_id=recipe.mask_token_id,
        markov_rank=recipe.markov_rank,
        markov_head_type=recipe.markov_head_type,
        confidence_head=recipe.confidence_head,
        confidence_head_with_markov=recipe.confidence_head and recipe.markov_rank > 0,
        context_window=recipe.context_window,
        draft_vocab_size=None if draft_vocab_ids is None else len(draft_vocab_ids),
    )
    return DSparkObjective(new_drafter(config, target.decoder, draft_vocab_ids, recipe.source_layers), losses)


def build_dflash(
    recipe: DrafterRecipe, losses: LossConfig, target: LoadedTarget, draft_vocab_ids: Tensor | None
) -> DSparkObjective:
    bare = dataclasses.replace(recipe, markov_rank=0, confidence_head=False)
    return build_dspark(bare, losses, target, draft_vocab_ids)


class DSparkObjective:
    matrix_prefixes = ("layers.", "projection.")

    def __init__(self, drafter: DSparkDrafter, config: LossConfig) -> None:
        self.module = drafter
        self._config = config
        self._weights = position_weights(drafter.config.block_size, config.loss_decay)
        self._draft_index = _draft_index(drafter)

    @property
    def block_size(self) -> int:
        return self.module.config.block_size

    def backward(
        self, sequences: Sequence[FeatureSequence], generators: Sequence[torch.Generator], total: Total
    ) -> ObjectiveReport:
        """Gradients of the batch's mean loss, vocabulary-sized work done slice by slice."""
        drafter, config = self.module, self._config
        anchors = [
            draw_anchors(sequence, config.anchors_per_sequence, generator)
            for sequence, generator in zip(sequences, generators, strict=True)
        ]
        batch = pack(sequences, anchors, self.block_size, drafter.config.context_window)
        tokens, blocks = [span.tokens for span in batch.spans], [span.anchors for span in batch.spans]
        dropped = drop_spans(batch.taps, tokens, config.tap_dropout, generators)
        hidden = packed_hidden(drafter, dataclasses.replace(batch, taps=dropped))
        hidden = drop_spans(hidden, blocks, config.hidden_dropout, generators)
        labels = batch.labels if self._draft_index is None else self._draft_index[batch.labels]
        weights = batch.counted * self._weights
        inside = (weights * (labels != OUTSIDE_DRAFT_VOCAB)).sum()
        denominators = total(torch.stack((inside, weights.sum()))).clamp_min(1e-9)
        leaf = hidden.detach().requires_grad_()
        reports = []
        for start in range(0, len(leaf), config.slice_anchors):
            rows = slice(start, start + config.slice_anchors)
            losses = self._slice_losses(batch, leaf, labels, weights, rows)
            self._loss(losses, denominators).backward()  # type: ignore[no-untyped-call]
            reports.append(ObjectiveReport.of(losses, batch.counted[rows]))
        assert leaf.grad is not None
        hidden.backward(leaf.grad)  # type: ignore[no-untyped-call]
        return ObjectiveReport.unflatten(torch.stack([report.flatten() for report in reports]).sum(dim=0))

    def save(self, directory: Path) -> None:
        save_drafter(directory, self.module)

    def _loss(self, losses: BlockLosses, denominators: Tensor) -> Tensor:
        config, (inside, all_weights) = self._config, denominators
        loss: Tensor = (
            config.cross_entropy_weight * losses.cross_entropy.numerator / inside
            + config.distance_weight * losses.distance.numerator / all_weights
            + config.confidence_weight * losses.confidence.numerator / all_weights
        )
        return loss

    def _slice_losses(
        self, batch: PackedBatch, hidden: Tensor, labels: Tensor, weights: Tensor, rows: slice
    ) -> BlockLosses:
        drafter = self.module
        logits, confidence = drafter.teacher_forced(hidden[rows], batch.previous_ids[rows])
        with torch.no_grad():
            target = target_probabilities(
                batch.target_hidden[rows].to(drafter.lm_head.dtype),
                drafter.lm_head,
                batch.log_normalizers[rows],
            )
        return block_losses(logits, confidence, labels[rows], target, weights[rows])


def _draft_index(drafter: DSparkDrafter) -> Tensor | None:
    """Target token id -> draft vocabulary index, [vocab]; None when the two are the same."""
    ids = drafter.draft_vocab_ids
    if ids is None:
        return None
    index = torch.full((drafter.config.backbone.vocab_size,), OUTSIDE_DRAFT_VOCAB)
    index[ids] = torch.arange(len(ids))
    return index
