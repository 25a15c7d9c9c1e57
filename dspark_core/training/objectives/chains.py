"""Shared by the Eagle3 and MTP-1 objectives: packed chains of draft steps from anchors.

Context entries are pairs of a target feature and the token after it. The pairs of a sequence are
computed once and shared by the chains of all its anchors, each masked to its own context.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dspark_core.models.eagle3 import Eagle3Drafter
from dspark_core.models.mtp import MtpDrafter
from dspark_core.training.dropout import drop_spans
from dspark_core.training.features import FeatureSequence
from dspark_core.training.losses import OUTSIDE_DRAFT_VOCAB
from dspark_core.training.objectives.dspark import draft_index
from dspark_core.training.objectives.protocol import ObjectiveReport, Total
from dspark_core.training.packing import PackedBatch, draw_anchors, pack
from dspark_core.training.positions import DrawnPositions, draw_positions
from dspark_core.training.recipe import LossConfig
from dspark_core.training.vocabulary_loss import VocabularyLoss, VocabularyRows


@dataclass(frozen=True, slots=True)
class PairedBatch:
    packed: PackedBatch
    next_ids: Tensor  # [tokens] the token after each context position

    @classmethod
    def of(cls, sequences: Sequence[FeatureSequence], anchors: Sequence[Tensor], steps: int) -> PairedBatch:
        """anchors[i] [anchors of sequence i], ascending, not empty."""
        following = [
            sequence.token_ids[1 : int(rows[-1]) + 1]
            for sequence, rows in zip(sequences, anchors, strict=True)
        ]
        return cls(pack(sequences, anchors, steps, None), torch.cat(following))

    def to(self, device: torch.device) -> PairedBatch:
        return PairedBatch(self.packed.to(device), self.next_ids.to(device))

    @property
    def first_rows(self) -> Tensor:
        """[anchors] row of each anchor's own pair, the last it sees, in the packed context."""
        rows = [
            self.packed.anchor_positions[span.anchors] - 1 + span.tokens.start for span in self.packed.spans
        ]
        return torch.cat(rows)


class ChainObjective(ABC):
    matrix_prefixes: tuple[str, ...] = ("layer.", "projection.")
    soft_labels: bool
    """Cross-entropy against the target's distribution instead of the next token."""

    def __init__(self, drafter: Eagle3Drafter | MtpDrafter, config: LossConfig) -> None:
        self._drafter = drafter
        self._config = config
        self._draft_index = draft_index(drafter.draft_vocab_ids, drafter.config.backbone.vocab_size)
        self._vocabulary_loss = VocabularyLoss(
            config.slice_anchors * drafter.config.block_size, drafter.config.backbone.final_logit_softcap
        )

    @property
    def block_size(self) -> int:
        return self._drafter.config.block_size

    def backward(
        self, sequences: Sequence[FeatureSequence], generators: Sequence[torch.Generator], total: Total
    ) -> ObjectiveReport:
        """See `Objective.backward`; vocabulary-sized work is done slice by slice."""
        config = self._config
        anchors = [
            draw_anchors(sequence, config.anchors_per_sequence, generator)
            for sequence, generator in zip(sequences, generators, strict=True)
        ]
        batch = PairedBatch.of([self.inputs(s) for s in sequences], anchors, self.block_size)
        positions = draw_positions(batch.packed, config, generators)
        tokens = [span.tokens for span in batch.packed.spans]
        taps = batch.packed.taps.to(self._drafter.norm.weight.dtype)
        taps = drop_spans(taps, tokens, config.tap_dropout, generators)
        device = self._drafter.norm.weight.device
        batch = batch.to(device)
        hidden = self.chains(batch, taps.to(device))
        chains = [span.anchors for span in batch.packed.spans]
        hidden = drop_spans(hidden, chains, config.hidden_dropout, generators)
        loss, report = self._losses(batch.packed, positions.to(device), hidden, total)
        loss.backward()  # type: ignore[no-untyped-call]
        return report

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write the module's current weights as a checkpoint that the engine loads."""

    @abstractmethod
    def inputs(self, sequence: FeatureSequence) -> FeatureSequence:
        """The sequence with the projection's input as its taps."""

    @abstractmethod
    def chains(self, batch: PairedBatch, taps: Tensor) -> Tensor:
        """Teacher-forced draft steps -> normed hidden states [anchors, steps, d]."""

    def _losses(
        self, packed: PackedBatch, positions: DrawnPositions, hidden: Tensor, total: Total
    ) -> tuple[Tensor, ObjectiveReport]:
        """hidden [anchors, steps, d] -> this worker's share of the mean loss, and its sums."""
        config, at, weights = self._config, positions.index, positions.weights
        labels = packed.labels.flatten()[at]
        if self._draft_index is not None:
            labels = self._draft_index.to(labels.device)[labels]
        taught = weights if self.soft_labels else weights * (labels != OUTSIDE_DRAFT_VOCAB)
        denominators = total(torch.stack((taught.sum(), weights.sum()))).clamp_min(1e-9)
        rows = VocabularyRows(
            target_hidden=packed.target_hidden.flatten(0, 1)[at],
            log_normalizers=packed.log_normalizers.flatten()[at],
            labels=labels,
            cross_entropy_scale=config.cross_entropy_weight * taught / denominators[0],
            distance_scale=config.distance_weight * weights / denominators[1],
            soft_labels=self.soft_labels,
        )
        found = self._vocabulary_loss(hidden.flatten(0, 1)[at], self._drafter.lm_head, rows)
        steps = at % self.block_size
        report = ObjectiveReport.of_rows(found, None, weights, taught, steps, self.block_size)
        return found.total, report


def final_states(sequence: FeatureSequence) -> FeatureSequence:
    """The sequence with the target's final hidden states as its taps."""
    return replace(sequence, taps=sequence.final)
