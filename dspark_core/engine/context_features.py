"""The features drafters draft from: taps of the target, projected when somebody wants them.

Projecting a token or two at a time costs a twentieth of a small target's step, mostly for reading the
projection's weights, and is in vain while nobody drafts. So taps wait until features are read or enough
rows have come together to be worth their weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dspark_core.engine.kv_cache import PagedFeatures

MAX_WAITING_ROWS = 64
"""More are projected at once: their weights are paid for, and taps are several times as large as features."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextProjection:
    """The drafter's `fc` (and DSpark's `hidden_norm`), applied here so that d values travel, not m*d."""

    project: nn.Module
    """taps [tokens, m*d] -> features [tokens, d]."""
    target_layer_ids: tuple[int, ...]
    feature_size: int


class ContextFeatures:
    """Reads what was written last to each slot, whether it has been projected yet or not."""

    def __init__(self, projection: ContextProjection, paged: PagedFeatures, *, at_once: bool = False) -> None:
        """`at_once`: nothing waits. A recorded pass writes over its taps, and has the projection in it."""
        self._at_once = at_once
        self._projection = projection
        self._paged = paged
        self._waiting: list[tuple[Tensor, Tensor]] = []  # slots [tokens], taps [tokens, m*d]; oldest first
        self._rows = 0

    def write(self, slots: Tensor, taps: Tensor) -> None:
        """Keeps both, unless it works at once: neither may change afterwards."""
        if self._at_once:
            self._paged.write(slots, self._projection.project(taps))
            return
        self._waiting.append((slots, taps))
        self._rows += len(slots)
        if self._rows > MAX_WAITING_ROWS:
            self._project()

    def read(self, slots: Tensor) -> Tensor:
        """slots [tokens] -> a copy [tokens, size]."""
        self._project()
        return self._paged.read(slots)

    @torch.inference_mode()
    def _project(self) -> None:
        if not self._waiting:
            return
        waiting, self._waiting, self._rows = self._waiting, [], 0
        if len(waiting) == 1:
            slots, taps = waiting[0]
            self._paged.write(slots, self._projection.project(taps))
            return
        counts = [len(slots) for slots, _ in waiting]
        features = self._projection.project(torch.cat([taps for _, taps in waiting]))
        # One pass after the other: a position that was rejected is written again by a later one.
        for (slots, _), rows in zip(waiting, features.split(counts), strict=True):
            self._paged.write(slots, rows)
