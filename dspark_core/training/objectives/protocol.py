"""What the trainer needs from a drafting algorithm: gradients of a batch, and a checkpoint.

The trainer knows about optimisers, schedules and checkpoints, but not about drafters. An objective owns the
trained module and turns sequences of target features into gradients. It draws random numbers only from the
generators it is given, one per sequence, so that a batch is the same on any number of workers.
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
"""Sums a tensor over all workers; the identity for a single one."""


class Objective(Protocol):
    @property
    def module(self) -> nn.Module:
        """The module to train. The trainer owns its parameters' dtype, device and gradients."""
        ...

    @property
    def block_size(self) -> int:
        """Number of draft positions in reports."""
        ...

    @property
    def matrix_prefixes(self) -> tuple[str, ...]:
        """Name prefixes of the parameters that Muon may optimise if they are two-dimensional."""
        ...

    def backward(
        self, sequences: Sequence[FeatureSequence], generators: Sequence[torch.Generator], total: Total
    ) -> ObjectiveReport:
        """Accumulate the gradient of this worker's share of the global batch's mean loss -> its sums.

        Every denominator goes through `total`, so that the workers' gradients only need to be summed.
        `generators[i]` (CPU) serves `sequences[i]` alone. Every sequence has at least two answer tokens.
        """
        ...

    def save(self, directory: Path) -> None:
        """Write the module's current weights as a checkpoint that the engine loads."""
        ...


@dataclass(frozen=True, slots=True)
class ObjectiveReport:
    """Sums over the positions of a batch; sums of slices and of workers can be added."""

    cross_entropy: LossTerm
    distance: LossTerm
    """L1 distance between draft and target distributions."""
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
        """All tensors [rows]: confidence loss, weights, `inside` (weights for the cross-entropy, usually
        zero for labels outside the draft vocabulary), and each row's position in its block."""
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
        """All sums, [6 + 2 * block] float64; inverse of `unflatten`."""
        terms = (self.cross_entropy, self.distance, self.confidence)
        scalars = torch.stack([x.double() for term in terms for x in (term.numerator, term.denominator)])
        return torch.cat((scalars, self.accepted.double(), self.counted.double()))

    @classmethod
    def unflatten(cls, sums: Tensor) -> ObjectiveReport:
        terms = [LossTerm(*pair) for pair in sums[:6].view(3, 2)]
        accepted, counted = sums[6:].chunk(2)
        return cls(terms[0], terms[1], terms[2], accepted, counted)
