"""Drafting algorithms by name, with the builders of their objectives. A new algorithm is one entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dspark_core.errors import ConfigError
from dspark_core.models.loading import LoadedTarget
from dspark_core.training.objectives.dspark import build_dflash, build_dspark
from dspark_core.training.objectives.eagle3 import STEP_DECAY_LOSS, build_eagle3
from dspark_core.training.objectives.mtp1 import ALL_POSITIONS, build_mtp1
from dspark_core.training.objectives.protocol import Objective
from dspark_core.training.recipe import DrafterRecipe, LossConfig

Builder = Callable[[DrafterRecipe, LossConfig, LoadedTarget, Tensor | None], Objective]
"""(geometry, losses, target loaded with `pack=False`, draft vocabulary ids [n] or None for all)
-> an objective over a new float32 drafter."""


@dataclass(frozen=True, slots=True)
class Algorithm:
    build: Builder
    losses: LossConfig
    """The algorithm's default losses, as in its paper."""


ALGORITHMS: dict[str, Algorithm] = {
    "dspark": Algorithm(build_dspark, LossConfig()),
    "dflash": Algorithm(
        build_dflash, LossConfig(cross_entropy_weight=1.0, distance_weight=0.0, confidence_weight=0.0)
    ),
    "eagle3": Algorithm(
        build_eagle3,
        LossConfig(
            cross_entropy_weight=1.0,
            distance_weight=0.0,
            confidence_weight=0.0,
            loss_decay=STEP_DECAY_LOSS,
        ),
    ),
    "mtp1": Algorithm(
        build_mtp1,
        LossConfig(
            anchors_per_sequence=ALL_POSITIONS,
            slice_anchors=256,
            cross_entropy_weight=1.0,
            distance_weight=0.0,
            confidence_weight=0.0,
        ),
    ),
}


def algorithm(name: str) -> Algorithm:
    """Raises ConfigError listing the known names."""
    found = ALGORITHMS.get(name)
    if found is None:
        raise ConfigError(f"algorithm must be one of {', '.join(sorted(ALGORITHMS))}, got {name!r}")
    return found
