"""Context features for drafters: the target's tapped hidden states, projected lazily.

Projecting a token or two at a time costs a twentieth of a small target's step, mostly for reading the
projection's weights, and is wasted while nobody drafts. So taps are kept until features are read, or until
enough rows have accumulated to amortise the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dspark_core.engine.caches.kv_cache import PagedFeatures

MAX_WAITING_ROWS = 64
"""More rows are projected at once: they amortise the weights, and taps are larger than features."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextProjection:
    """The drafter's `fc` (and DSpark's `hidden_norm`), applied here so that only d values per token are sent
    instead of m*d."""

    project: nn.Module
    """taps [tokens, m*d] -> features [tokens, d]."""
    target_layer_ids: tuple[int, ...]
    feature_size: int


class ContextFeatures:
    """Stores features by slot. Reads return what was last written, whether or not projected already."""

    def __init__(self, projection: ContextProjection, paged: PagedFeatures, *, at_once: bool = False) -> None:
        """`at_once`: project immediately. Needed for recorded passes, which include the projection and
        overwrite their taps."""
        self._at_once = at_once
        self._projection = projection
        self._paged = paged
        self._waiting: list[tuple[Tensor, Tensor]] = []  # slots [tokens], taps [tokens, m*d]; oldest first
        self._rows = 0

    def write(self, slots: Tensor, taps: Tensor) -> None:
        """Keeps references to both, unless projecting at once: do not modify them afterwards."""
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
        # In order of the passes: a later pass rewrites positions that were rejected.
        for (slots, _), rows in zip(waiting, features.split(counts), strict=True):
            self._paged.write(slots, rows)
