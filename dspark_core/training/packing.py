"""Packs draft blocks of several sequences into one batch without padding (paper, training section).

Anchors are drawn at random where the anchor and the next token are both answer tokens. Only the context
that some anchor of a sequence can see is kept; blocks address it by token-level indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from dspark_core.training.features import FeatureSequence


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's part of a packed batch."""

    tokens: slice
    anchors: slice


@dataclass(frozen=True, slots=True)
class PackedBatch:
    taps: Tensor  # [tokens, m * d]
    positions: Tensor  # [tokens]
    anchor_ids: Tensor  # [anchors]
    anchor_positions: Tensor  # [anchors]
    labels: Tensor  # [anchors, block] token ids that followed the anchor
    previous_ids: Tensor  # [anchors, block] the token before each label
    counted: Tensor  # [anchors, block] bool: label and all labels before it are answer tokens
    target_hidden: Tensor  # [anchors, block, d]
    log_normalizers: Tensor  # [anchors, block]
    spans: tuple[Span, ...]

    def to(self, device: torch.device) -> PackedBatch:
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


def draw_anchors(sequence: FeatureSequence, count: int, generator: torch.Generator) -> Tensor:
    """Up to `count` distinct anchor positions, ascending; empty when the answer is too short."""
    candidates = len(sequence) - 1 - sequence.answer_start  # the last token has none after it
    if candidates <= 0:
        return torch.empty(0, dtype=torch.long)
    chosen = torch.randperm(candidates, generator=generator)[:count]
    return sequence.answer_start + chosen.sort().values


def pack(
    sequences: Sequence[FeatureSequence],
    anchors: Sequence[Tensor],
    block_size: int,
    context_window: int | None,
) -> PackedBatch:
    """anchors[i] [anchors of sequence i], ascending. Sequences without anchors are left out."""
    parts = [
        _Part.of(sequence, rows, block_size, context_window)
        for sequence, rows in zip(sequences, anchors, strict=True)
        if len(rows)
    ]
    if not parts:
        raise ValueError("no anchors to pack")
    return PackedBatch(
        taps=torch.cat([part.sequence.taps[part.first : part.end] for part in parts]),
        positions=torch.cat([torch.arange(part.first, part.end) for part in parts]),
        anchor_ids=torch.cat([part.sequence.token_ids[part.anchors] for part in parts]),
        anchor_positions=torch.cat([part.anchors for part in parts]),
        labels=torch.cat([part.sequence.token_ids[part.index + 1] for part in parts]),
        previous_ids=torch.cat([part.sequence.token_ids[part.index] for part in parts]),
        counted=torch.cat([part.counted for part in parts]),
        target_hidden=torch.cat([part.sequence.final[part.index] for part in parts]),
        log_normalizers=torch.cat([part.sequence.log_normalizers[part.index] for part in parts]),
        spans=_spans(parts),
    )


@dataclass(frozen=True, slots=True)
class _Part:
    sequence: FeatureSequence
    anchors: Tensor  # [anchors]
    index: Tensor  # [anchors, block] positions of the tokens before the labels, clamped
    counted: Tensor  # [anchors, block]
    first: int
    end: int
    """Context positions [first, end) that some anchor sees."""

    @classmethod
    def of(cls, sequence: FeatureSequence, anchors: Tensor, block_size: int, window: int | None) -> _Part:
        index = anchors[:, None] + torch.arange(block_size)
        last = len(sequence) - 2
        first = 0 if window is None else max(0, int(anchors[0]) - window)
        return cls(sequence, anchors, index.clamp_max(last), index <= last, first, int(anchors[-1]))


def _spans(parts: Sequence[_Part]) -> tuple[Span, ...]:
    spans, token, anchor = [], 0, 0
    for part in parts:
        next_token, next_anchor = token + part.end - part.first, anchor + len(part.anchors)
        spans.append(Span(slice(token, next_token), slice(anchor, next_anchor)))
        token, anchor = next_token, next_anchor
    return tuple(spans)
