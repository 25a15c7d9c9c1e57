"""What the objectives of Eagle3 and MTP-1 share: chains of draft steps from anchors, packed.

Context entries are pairs of a target feature and the token after it. All pairs of a sequence are
computed once; the chains of its anchors read them through one attention mask.
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
from dspark_core.training.frozen_head import HeadScales, HeadTarget, frozen_head_losses
from dspark_core.training.losses import OUTSIDE_DRAFT_VOCAB, LossTerm, position_weights
from dspark_core.training.objectives.protocol import ObjectiveReport, Total
from dspark_core.training.packing import PackedBatch, draw_anchors, pack
from dspark_core.training.recipe import LossConfig

_SLICE_POSITIONS = 256
"""Positions whose vocabulary-sized tensors exist at a time."""


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

    @property
    def first_rows(self) -> Tensor:
        """[anchors] where each anchor's own pair, the last it sees, lies in the context."""
        rows = [
            self.packed.anchor_positions[span.anchors] - 1 + span.tokens.start for span in self.packed.spans
        ]
        return torch.cat(rows)


class ChainObjective(ABC):
    matrix_prefixes: tuple[str, ...] = ("layer.", "projection.")
    soft_labels: bool
    """Cross-entropy against the target's distribution instead of the token that followed."""

    def __init__(self, drafter: Eagle3Drafter | MtpDrafter, config: LossConfig) -> None:
        self._drafter = drafter
        self._config = config
        self._weights = position_weights(drafter.config.block_size, config.loss_decay)
        self._draft_index = _draft_index(drafter)

    @property
    def block_size(self) -> int:
        return self._drafter.config.block_size

    def backward(
        self, sequences: Sequence[FeatureSequence], generators: Sequence[torch.Generator], total: Total
    ) -> ObjectiveReport:
        """Gradients of the batch's mean loss, vocabulary-sized work done slice by slice."""
        config = self._config
        anchors = [
            draw_anchors(sequence, config.anchors_per_sequence, generator)
            for sequence, generator in zip(sequences, generators, strict=True)
        ]
        batch = PairedBatch.of([self.inputs(s) for s in sequences], anchors, self.block_size)
        packed = batch.packed
        taps = packed.taps.to(self._drafter.norm.weight.dtype)
        taps = drop_spans(taps, [span.tokens for span in packed.spans], config.tap_dropout, generators)
        hidden = self.chains(batch, taps)
        chains = [span.anchors for span in packed.spans]
        hidden = drop_spans(hidden, chains, config.hidden_dropout, generators)
        gradient, report = self._losses(packed, hidden.detach(), total)
        hidden.backward(gradient)  # type: ignore[no-untyped-call]
        return report

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Writes the module's present weights as a checkpoint that the engine loads."""

    @abstractmethod
    def inputs(self, sequence: FeatureSequence) -> FeatureSequence:
        """The sequence with what the projection reads in the place of its taps."""

    @abstractmethod
    def chains(self, batch: PairedBatch, taps: Tensor) -> Tensor:
        """Teacher-forced draft steps -> normed hidden states [anchors, steps, d]."""

    def _losses(self, packed: PackedBatch, hidden: Tensor, total: Total) -> tuple[Tensor, ObjectiveReport]:
        """hidden [anchors, steps, d] -> its gradient, and the sums."""
        anchors, steps, size = hidden.shape
        target = self._target(packed)
        inside = (target.weights * (target.labels != OUTSIDE_DRAFT_VOCAB)).sum()
        sums = total(torch.stack((inside, target.weights.sum()))).clamp_min(1e-9)
        scales = HeadScales(
            cross_entropy=self._config.cross_entropy_weight / float(sums[1 if self.soft_labels else 0]),
            distance=self._config.distance_weight / float(sums[1]),
            soft_labels=self.soft_labels,
        )
        rows = _SLICE_POSITIONS
        flat, head = hidden.view(-1, size), self._drafter.lm_head
        parts = [
            frozen_head_losses(flat[at : at + rows], head, target[at : at + rows], scales)
            for at in range(0, len(flat), rows)
        ]
        acceptance = torch.cat([part.acceptance for part in parts]).view(anchors, steps)
        none = inside.new_zeros(())
        report = ObjectiveReport(
            cross_entropy=_added([part.cross_entropy for part in parts]),
            distance=_added([part.distance for part in parts]),
            confidence=LossTerm(none, none),
            accepted=(acceptance * packed.counted).sum(dim=0),
            counted=packed.counted.sum(dim=0).float(),
        )
        return torch.cat([part.gradient for part in parts]).view_as(hidden), report

    def _target(self, packed: PackedBatch) -> HeadTarget:
        labels = packed.labels if self._draft_index is None else self._draft_index[packed.labels]
        return HeadTarget(
            hidden=packed.target_hidden.flatten(0, 1),
            log_normalizers=packed.log_normalizers.flatten(),
            labels=labels.flatten(),
            weights=(packed.counted * self._weights).flatten(),
        )


def final_states(sequence: FeatureSequence) -> FeatureSequence:
    """The sequence with the target's final hidden states as its taps."""
    return replace(sequence, taps=sequence.final)


def _added(terms: Sequence[LossTerm]) -> LossTerm:
    return LossTerm(
        torch.stack([term.numerator for term in terms]).sum(),
        torch.stack([term.denominator for term in terms]).sum(),
    )


def _draft_index(drafter: Eagle3Drafter | MtpDrafter) -> Tensor | None:
    """Target token id -> draft vocabulary index, [vocab]; None when the two are the same."""
    ids = drafter.draft_vocab_ids
    if ids is None:
        return None
    index = torch.full((drafter.config.backbone.vocab_size,), OUTSIDE_DRAFT_VOCAB)
    index[ids] = torch.arange(len(ids))
    return index
