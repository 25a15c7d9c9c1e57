"""DSpark's training objective (paper, training section), and DFlash's: the same without the two heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_core.models.config import DrafterConfig, draft_backbone
from dspark_core.models.drafter_checkpoint import save_drafter
from dspark_core.models.dspark import DSparkDrafter
from dspark_core.models.loading import LoadedTarget
from dspark_core.models.moe import take_balance_loss
from dspark_core.training.block_attention import packed_hidden
from dspark_core.training.dropout import drop_spans
from dspark_core.training.features import FeatureSequence
from dspark_core.training.initial import new_drafter
from dspark_core.training.losses import OUTSIDE_DRAFT_VOCAB
from dspark_core.training.objectives.protocol import ObjectiveReport, Total
from dspark_core.training.packing import PackedBatch, draw_anchors, pack
from dspark_core.training.positions import DrawnPositions, draw_positions
from dspark_core.training.recipe import DrafterRecipe, LossConfig
from dspark_core.training.vocabulary_loss import VocabularyLoss, VocabularyRows

LAYERS = 2
"""Default number of backbone layers."""


def build_dspark(
    recipe: DrafterRecipe, losses: LossConfig, target: LoadedTarget, draft_vocab_ids: Tensor | None
) -> DSparkObjective:
    config = DrafterConfig(
        backbone=draft_backbone(target.config, recipe.num_layers or len(recipe.source_layers) or LAYERS),
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
        moe=recipe.moe,
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
        self._draft_index = draft_index(drafter.draft_vocab_ids, drafter.config.backbone.vocab_size)
        self._vocabulary_loss = VocabularyLoss(
            config.slice_anchors * drafter.config.block_size, drafter.config.backbone.final_logit_softcap
        )

    @property
    def block_size(self) -> int:
        return self.module.config.block_size

    def backward(
        self, sequences: Sequence[FeatureSequence], generators: Sequence[torch.Generator], total: Total
    ) -> ObjectiveReport:
        drafter, config = self.module, self._config
        anchors = [
            draw_anchors(sequence, config.anchors_per_sequence, generator)
            for sequence, generator in zip(sequences, generators, strict=True)
        ]
        packed = pack(sequences, anchors, self.block_size, drafter.config.context_window)
        positions = draw_positions(packed, config, generators)
        tokens, blocks = [span.tokens for span in packed.spans], [span.anchors for span in packed.spans]
        taps = drop_spans(packed.taps, tokens, config.tap_dropout, generators)
        batch = dataclasses.replace(packed, taps=taps).to(drafter.norm.weight.device)
        hidden = packed_hidden(drafter, batch)
        hidden = drop_spans(hidden, blocks, config.hidden_dropout, generators)
        loss, report = self._losses(batch, positions.to(hidden.device), hidden, total)
        balance = take_balance_loss(drafter)
        if balance is not None:
            loss = loss + balance / total(torch.ones_like(balance))
        loss.backward()  # type: ignore[no-untyped-call]
        return report

    def save(self, directory: Path) -> None:
        save_drafter(directory, self.module)

    def _losses(
        self, batch: PackedBatch, positions: DrawnPositions, hidden: Tensor, total: Total
    ) -> tuple[Tensor, ObjectiveReport]:
        """hidden [anchors, block, d] -> this worker's share of the mean loss, and its sums."""
        drafter, config, at = self.module, self._config, positions.index
        weights = positions.weights
        labels = batch.labels.flatten()[at]
        if self._draft_index is not None:
            labels = self._draft_index.to(labels.device)[labels]
        inside = weights * (labels != OUTSIDE_DRAFT_VOCAB)
        denominators = total(torch.stack((inside.sum(), weights.sum()))).clamp_min(1e-9)
        rows = VocabularyRows(
            target_hidden=batch.target_hidden.flatten(0, 1)[at],
            log_normalizers=batch.log_normalizers.flatten()[at],
            labels=labels,
            cross_entropy_scale=config.cross_entropy_weight * inside / denominators[0],
            distance_scale=config.distance_weight * weights / denominators[1],
        )
        embedded, latent, bias_weight = None, None, None
        if drafter.markov_head is not None:
            embedded = drafter.markov_head.embed(batch.previous_ids)
            latent = drafter.markov_head.block_latents(embedded, hidden).flatten(0, 1)[at]
            bias_weight = drafter.markov_head.markov_w2.weight
        found = self._vocabulary_loss(hidden.flatten(0, 1)[at], drafter.lm_head, rows, latent, bias_weight)
        loss, confidence = found.total, None
        if drafter.confidence_head is not None:
            logits = drafter.confidence_head(hidden, embedded).flatten()[at]
            confidence = F.binary_cross_entropy_with_logits(
                logits.float(), found.acceptance, reduction="none"
            )
            loss = loss + config.confidence_weight * (confidence * weights).sum() / denominators[1]
        report = ObjectiveReport.of_rows(
            found, confidence, weights, inside, at % self.block_size, self.block_size
        )
        return loss, report


def draft_index(draft_vocab_ids: Tensor | None, vocab_size: int) -> Tensor | None:
    """Target token id -> draft vocabulary index, [vocab]; None when the two are the same."""
    if draft_vocab_ids is None:
        return None
    index = torch.full((vocab_size,), OUTSIDE_DRAFT_VOCAB)
    index[draft_vocab_ids] = torch.arange(len(draft_vocab_ids))
    return index
