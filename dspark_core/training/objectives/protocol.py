"""What the trainer asks of a drafting algorithm: gradients of a batch, and a checkpoint.

The trainer knows optimisers, schedules and checkpoints, and no drafter. An objective owns the module
that is trained and turns sequences of target features into gradients. It draws its random numbers from
the generators it is given, one per sequence, so that a batch means the same on any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from dspark_core.training.features import FeatureSequence
from dspark_core.training.losses import LossTerm
from dspark_core.training.vocabulary_loss import VocabularyLosses

Total = Callable[[Tensor], Tensor]
"""Sums a tensor over all workers; the identity when there is one."""


class Objective(Protocol):
    @property
    def module(self) -> nn.Module:
        """Its parameters are trained. The trainer owns their dtype, device and gradients."""
        ...

    @property
    def block_size(self) -> int:
        """Draft positions that reports tell apart."""
        ...

    @property
    def matrix_prefixes(self) -> tuple[str, ...]:
        """Parameter names that start so and have two dimensions may be optimised by Muon."""
        ...

    def backward(
        self, sequences: Sequence[FeatureSequence], generators: Sequence[torch.Generator], total: Total
    ) -> ObjectiveReport:
        """Adds to the parameters' gradients this worker's part of the global batch's mean loss.

        Every denominator goes through `total`, so that the workers' gradients only need adding up.
        `generators[i]` (CPU) serves `sequences[i]` alone. Every sequence has two answer tokens or more.
        Returns this worker's sums.
        """
        ...

    def save(self, directory: Path) -> None:
        """Writes the module's present weights as a checkpoint that the engine loads."""
        ...


@dataclass(frozen=True, slots=True)
class ObjectiveReport:
    """Sums over the positions of a batch; those of slices and of workers can be added."""

    cross_entropy: LossTerm
    distance: LossTerm
    """L1 between draft and target distribution."""
    confidence: LossTerm
    """Zero over zero without a confidence head."""
    accepted: Tensor  # [block] sums of the acceptance probability, teacher-forced
    counted: Tensor  # [block] positions behind those sums

    @classmethod
    def of_rows(
        cls,
        losses: VocabularyLosses,
        confidence: Tensor | None,
        weights: Tensor,
        inside: Tensor,
        positions: Tensor,
        block_size: int,
    ) -> ObjectiveReport:
        """All tensors [rows]: the confidence loss, the weights (those of labels outside the draft
        vocabulary zeroed in `inside`), and each row's position in its block."""
        none = weights.new_zeros(())
        accepted, counted = weights.new_zeros((2, block_size)).index_add(
            1, positions, torch.stack((losses.acceptance, torch.ones_like(weights)))
        )
        return cls(
            LossTerm((losses.cross_entropy * inside).sum(), inside.sum()),
            LossTerm((losses.distance * weights).sum(), weights.sum()),
            LossTerm(none, none)
            if confidence is None
            else LossTerm((confidence.detach() * weights).sum(), weights.sum()),
            accepted,
            counted,
        )

    def __add__(self, other: ObjectiveReport) -> ObjectiveReport:
        return ObjectiveReport.unflatten(self.flatten() + other.flatten())

    def flatten(self) -> Tensor:
        """All sums, [6 + 2 * block] float64; `unflatten` is the inverse."""
        terms = (self.cross_entropy, self.distance, self.confidence)
        scalars = torch.stack([x.double() for term in terms for x in (term.numerator, term.denominator)])
        return torch.cat((scalars, self.accepted.double(), self.counted.double()))

    @classmethod
    def unflatten(cls, sums: Tensor) -> ObjectiveReport:
        terms = [LossTerm(*pair) for pair in sums[:6].view(3, 2)]
        accepted, counted = sums[6:].chunk(2)
        return cls(terms[0], terms[1], terms[2], accepted, counted)
