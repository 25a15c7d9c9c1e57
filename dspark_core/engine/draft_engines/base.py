"""The base of all draft engines: keeps the context of many sequences, which grows batch by batch.

A concrete engine defines how its drafter turns features into context keys and values, and how it drafts from
them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Required, TypedDict

import torch
from torch import Tensor

from dspark_core.algorithms.transfer import to_device
from dspark_core.engine.draft_engines.draft_context import DraftContext
from dspark_core.engine.protocols import DraftBlock, DraftGeometry, DraftItem, SparseDistribution
from dspark_core.errors import InvalidRequestError
from dspark_core.models.config import AnyDrafterConfig


class EngineArguments(TypedDict, total=False):
    """Constructor arguments of every draft engine, besides its drafter."""

    fingerprint: Required[str]
    num_pages: Required[int]
    page_tokens: int
    generator: torch.Generator | None


def read_together(token_ids: Tensor, confidences: Tensor) -> tuple[list[list[int]], list[list[float]]]:
    """Reads two [requests, block] tensors in one transfer, so that a GPU is synchronised only once."""
    tokens, rows = torch.stack((token_ids.double(), confidences.double())).tolist()
    return [list(map(int, ids)) for ids in tokens], rows


@dataclass(frozen=True, slots=True)
class Appended:
    """Positions [start, end) that an item adds to the context of its sequence."""

    item: DraftItem
    start: int

    @property
    def end(self) -> int:
        return self.item.anchor_position


class ContextDraftEngine(ABC):
    def __init__(
        self,
        config: AnyDrafterConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        context_window: int | None,
        fingerprint: str,
        num_pages: int,
        page_tokens: int = 16,
        generator: torch.Generator | None = None,
        room: int = 0,
    ) -> None:
        """`generator`, on the CPU, draws uncoupled drafts; None: a newly seeded one.

        `room` as in `DraftContext`.
        """
        backbone = config.backbone
        self.geometry = DraftGeometry(
            fingerprint=fingerprint,
            block_size=config.block_size,
            feature_size=backbone.hidden_size,
            vocab_size=backbone.vocab_size,
            context_window=context_window,
        )
        self._last_anchor = backbone.max_context_tokens
        """Last anchor position whose block is within the known positions. A position beyond them would cause
        a GPU error from which the process cannot recover."""
        self._dtype = dtype
        self.device = device
        """Where it computes; features may be on any device."""
        self._generator = generator or torch.Generator().manual_seed(torch.seed() % 2**63)
        self._context = DraftContext(
            num_pages=num_pages, page_tokens=page_tokens, window=context_window, room=room
        )

    @property
    def num_sequences(self) -> int:
        """Number of sequences whose context is held."""
        return self._context.num_sequences

    def prepare(self) -> None:
        """Does ahead what the first pass of each size would otherwise do, such as recording it. No pass may
        run meanwhile."""
        return

    def release(self, sequence_ids: Sequence[str]) -> None:
        for sequence_id in sequence_ids:
            self._context.forget(sequence_id)

    @torch.inference_mode()
    def propose(self, items: Sequence[DraftItem]) -> list[DraftBlock]:
        """Appends the items' features and drafts a block for each, in order.

        An item whose context is incomplete or does not fit gets a block with `needs_context`. An item beyond
        the drafter's positions gets an empty block, and its sequence is forgotten. Raises InvalidRequestError
        for invalid items, such as features of a wrong shape.
        """
        within = [item for item in items if item.anchor_position <= self._last_anchor]
        ready = self._append(within)
        drafted = [item for item, is_ready in zip(within, ready, strict=True) if is_ready]
        blocks = iter(self._draft(drafted)) if drafted else iter(())
        answers = iter(
            next(blocks) if is_ready else DraftBlock(item.sequence_id, needs_context=True)
            for item, is_ready in zip(within, ready, strict=True)
        )
        return [
            next(answers) if item.anchor_position <= self._last_anchor else self._refused(item)
            for item in items
        ]

    @abstractmethod
    def _draft(self, items: Sequence[DraftItem]) -> list[DraftBlock]:
        """Drafts a block for each item; their contexts are complete up to the anchors."""

    @abstractmethod
    def _store(self, appended: Sequence[Appended], features: Tensor) -> None:
        """Computes and stores context keys and values of the features [rows, d] of `appended`, in order;
        their slots are reserved."""

    def _blocks(
        self,
        items: Sequence[DraftItem],
        token_ids: Sequence[Sequence[int]],
        confidences: Sequence[Sequence[float]],
        distributions: Mapping[int, SparseDistribution],
    ) -> list[DraftBlock]:
        """token_ids [requests, block]; confidences likewise, or with empty rows if the drafter has none;
        distributions by item index."""
        return [
            DraftBlock(item.sequence_id, tuple(ids), tuple(row), distributions.get(index))
            for index, (item, ids, row) in enumerate(zip(items, token_ids, confidences, strict=True))
        ]

    def _refused(self, item: DraftItem) -> DraftBlock:
        self._context.forget(item.sequence_id)
        return DraftBlock(item.sequence_id)

    def _append(self, items: Sequence[DraftItem]) -> list[bool]:
        """Stores the new context of all items at once; returns which contexts are complete."""
        for item in items:  # check all first: a refused batch must leave no reserved but unwritten context
            self._check(item)
        in_use = {item.sequence_id for item in items}
        stored: list[Appended] = []
        features: list[Tensor] = []
        ready = []
        for item in items:
            start, new = self._last_window(item)
            reserved = self._context.reserve(item.sequence_id, start, item.anchor_position, in_use=in_use)
            ready.append(reserved)
            if reserved and len(new):
                stored.append(Appended(item, start))
                features.append(new)
        if stored:
            self._store(stored, to_device(torch.cat(features), self.device).to(self._dtype))
        return ready

    def _last_window(self, item: DraftItem) -> tuple[int, Tensor]:
        """The position of the first new feature that a block can still see, and the features from there."""
        window = self.geometry.context_window
        surplus = 0 if window is None else max(0, len(item.features) - window)
        return item.features_start + surplus, item.features[surplus:]

    def _check(self, item: DraftItem) -> None:
        """Raises InvalidRequestError."""
        rows = item.anchor_position - item.features_start
        expected = (rows, self.geometry.feature_size)
        if tuple(item.features.shape) != expected:
            raise InvalidRequestError(
                f"features of {item.sequence_id!r} must be {expected} to end at the anchor "
                f"(position {item.anchor_position}), got {tuple(item.features.shape)}",
                field="features",
            )
        if not 0 <= item.anchor_token_id < self.geometry.vocab_size:
            raise InvalidRequestError(
                f"anchor_token_id must be in [0, {self.geometry.vocab_size}), got {item.anchor_token_id}",
                field="anchor_token_id",
            )
