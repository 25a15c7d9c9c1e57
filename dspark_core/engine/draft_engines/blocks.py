"""The engine of DSpark drafters: batched draft blocks for sequences at different positions."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Unpack

import torch
from torch import Tensor

from dspark_core.algorithms.calibration import ConfidenceScaling
from dspark_core.algorithms.transfer import to_device
from dspark_core.engine.devices import device_of
from dspark_core.engine.draft_engines.base import Appended, ContextDraftEngine, EngineArguments
from dspark_core.engine.draft_engines.block_draw import block_draw
from dspark_core.engine.draft_engines.block_layers import block_layers, block_room
from dspark_core.engine.draft_engines.confidences import Confidences
from dspark_core.engine.protocols import DraftBlock, DraftGeometry, DraftItem, DraftReply
from dspark_core.models.dspark import DSparkDrafter


class DraftEngine(ContextDraftEngine):
    def __init__(
        self,
        drafter: DSparkDrafter,
        *,
        confidence_scaling: ConfidenceScaling | None = None,
        **arguments: Unpack[EngineArguments],
    ) -> None:
        """`confidence_scaling` corrects the confidence logit of each position; None: used unchanged."""
        super().__init__(
            drafter.config,
            dtype=drafter.norm.weight.dtype,
            device=device_of(drafter),
            context_window=drafter.config.context_window,
            room=block_room(drafter),
            **arguments,
        )
        self._layers = block_layers(drafter, self._context)
        self._draw = block_draw(drafter, self._generator)
        self._confidences = Confidences(confidence_scaling, self.device)

    def _store(self, appended: Sequence[Appended], features: Tensor) -> None:
        self._layers.append(appended, features)

    def _draft(self, items: Sequence[DraftItem]) -> list[DraftBlock]:
        anchors = to_device(torch.tensor([item.anchor_token_id for item in items]), self.device)
        hidden = self._layers.hidden(items, self._block(items))
        drawn, distributions = self._draw(items, anchors, hidden)
        confidences: list[list[float]] = [[] for _ in items]
        if drawn.confidence_logits is not None:
            confidences = self._confidences.of_rows(drawn.confidence_logits.tolist())
        return self._blocks(items, drawn.token_ids.tolist(), confidences, distributions)

    def _block(self, items: Sequence[DraftItem]) -> int:
        """Number of positions worth computing. Although attention within a block is bidirectional, its first
        tokens are accepted as often if the last ones are missing (docs/performance-drafting.md)."""
        block = self.geometry.block_size
        return min(block, max(block if item.most_tokens is None else item.most_tokens for item in items))


class LocalDraftSource:
    """A `DraftSource` in the same process: drafts are ready when `propose` returns."""

    def __init__(self, engine: ContextDraftEngine) -> None:
        self._engine = engine

    @property
    def geometry(self) -> DraftGeometry:
        return self._engine.geometry

    @property
    def apart(self) -> bool:
        return False

    @property
    def connected(self) -> bool:
        return True

    @property
    def generation(self) -> int:
        return 0

    def propose(self, items: Sequence[DraftItem]) -> Future[DraftReply]:
        future: Future[DraftReply] = Future()
        future.set_result(DraftReply(self._engine.propose(items)))
        return future

    def release(self, sequence_ids: Sequence[str]) -> None:
        self._engine.release(sequence_ids)
