"""Packs a draft pass's inputs into one array of 64-bit values, so that a single copy takes them to the
device.

As for target steps (`step_inputs`), padding writes to the page that no sequence owns, and is never read.
Floats are stored by their bit patterns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from dspark_core.algorithms.sampling import SamplingRows
from dspark_core.engine.draft_engines.base import Appended
from dspark_core.engine.draft_engines.draft_context import DraftContext
from dspark_core.engine.protocols import DraftItem
from dspark_core.engine.target.step_inputs import num_tiles, tile_table
from dspark_core.records import Verification


@dataclass(frozen=True, slots=True)
class DraftShape:
    """Everything a draft pass's kernels depend on, apart from the values of its inputs."""

    requests: int
    features: int
    """Rows of new context."""
    block: int
    tile_queries: int
    greedy: bool
    """No request samples: only the most likely tokens are computed."""

    @property
    def tiles(self) -> int:
        return self.requests * int(num_tiles(np.array([self.block]), self.tile_queries)[0])


@dataclass(frozen=True, slots=True)
class DraftInputs:
    """Views into the packed array."""

    anchors: Tensor  # [requests] token ids
    positions: Tensor  # [requests] of the anchors
    block_slots: Tensor  # [requests * block] where the blocks' keys and values go
    runs: Tensor  # [requests, 4]: first row, block, slots of context, offset of its pages
    tiles: Tensor  # [tiles, 2]: run, first query
    feature_slots: Tensor  # [features]
    feature_positions: Tensor  # [features]
    greedy: Tensor  # [requests] 0 or 1
    coupled: Tensor  # [requests] 0 or 1
    seeds: Tensor  # [requests]
    top_k: Tensor  # [requests]
    temperature: Tensor  # [requests] float64
    top_p: Tensor  # [requests] float64
    min_p: Tensor  # [requests] float64
    uniforms: Tensor  # [requests, block] float64
    pages: Tensor  # the rest of the array

    @classmethod
    def of(cls, values: Tensor, shape: DraftShape) -> DraftInputs:
        """values [fixed_values + pages] int64"""
        parts: dict[str, Tensor] = {}
        start = 0
        for name, size in _sizes(shape).items():
            part = values[start : start + size]
            parts[name] = part.view(torch.float64) if name in _FLOATS else part
            start += size
        parts["runs"], parts["tiles"] = parts["runs"].view(-1, 4), parts["tiles"].view(-1, 2)
        parts["uniforms"] = parts["uniforms"].view(shape.requests, shape.block)
        return cls(**parts, pages=values[start:])

    def sampling_rows(self) -> SamplingRows:
        """Enables every kind of truncation: a recorded pass must not depend on the requests' parameters."""
        return SamplingRows(
            temperature=self.temperature.float(),
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p.float(),
            any_temperature=True,
            any_top_k=True,
            any_top_p=True,
            any_min_p=True,
        )


_FLOATS = ("temperature", "top_p", "min_p", "uniforms")


def fixed_values(shape: DraftShape) -> int:
    """Number of values before the page tables, whose length varies."""
    return sum(_sizes(shape).values())


def pack_draft(
    items: Sequence[DraftItem],
    appended: Sequence[Appended],
    context: DraftContext,
    shape: DraftShape,
    uniforms: Tensor | None,
) -> Tensor:
    """Returns [fixed_values + pages] int64 on the CPU. `appended`: new context, whose slots are reserved.

    uniforms [items, block] float64; None if no request needs them.
    """
    tables = [context.pages(item.sequence_id) for item in items]
    held = [context.num_visible(item.sequence_id) for item in items]
    offsets = np.cumsum([0, *(len(table) for table in tables)])
    packed = torch.zeros(fixed_values(shape) + int(offsets[-1]), dtype=torch.int64)
    views = DraftInputs.of(packed, shape)
    count, block = len(items), shape.block
    rows = [(index * block, block, held[index], int(offsets[index])) for index in range(count)]
    columns: dict[str, ArrayLike] = {
        "anchors": [item.anchor_token_id for item in items],
        "positions": [item.anchor_position for item in items],
        "block_slots": _block_slots(tables, held, block, context.page_tokens),
        "runs": rows,
        "tiles": tile_table(np.full(shape.requests, block), shape.tile_queries),
        "pages": [page for table in tables for page in table],
        **_appended_columns(appended, context),
        **_sampling_columns(items),
    }
    if uniforms is not None:
        columns["uniforms"] = uniforms.numpy()
    for name, values in columns.items():
        given = np.asarray(values)
        if len(given):
            getattr(views, name).numpy()[: len(given)] = given
    return packed


def _sizes(shape: DraftShape) -> dict[str, int]:
    requests, block = shape.requests, shape.block
    each = dict.fromkeys((field.name for field in fields(DraftInputs) if field.name != "pages"), requests)
    return each | {
        "block_slots": requests * block,
        "runs": 4 * requests,
        "tiles": 2 * shape.tiles,
        "feature_slots": shape.features,
        "feature_positions": shape.features,
        "uniforms": requests * block,
    }


def _block_slots(
    tables: Sequence[Sequence[int]], held: Sequence[int], block: int, page_tokens: int
) -> np.ndarray:
    """[requests * block]: each block is stored after its context, in room that the context leaves."""
    slots = np.zeros((len(tables), block), np.int64)
    for row, table, first in zip(slots, tables, held, strict=True):
        places = np.arange(first, first + block)
        row[:] = np.asarray(table)[places // page_tokens] * page_tokens + places % page_tokens
    return slots.reshape(-1)


def _appended_columns(appended: Sequence[Appended], context: DraftContext) -> dict[str, ArrayLike]:
    if not appended:
        return {}
    slots = [context.slots(one.item.sequence_id, one.start, one.end).numpy() for one in appended]
    positions = [np.arange(one.start, one.end) for one in appended]
    return {"feature_slots": np.concatenate(slots), "feature_positions": np.concatenate(positions)}


def _sampling_columns(items: Sequence[DraftItem]) -> dict[str, ArrayLike]:
    sampling = [item.sampling for item in items]
    return {
        "greedy": [one.greedy for one in sampling],
        "coupled": [item.verification is Verification.COUPLED for item in items],
        "seeds": [one.seed or 0 for one in sampling],
        "top_k": [one.top_k for one in sampling],
        "temperature": [one.temperature for one in sampling],
        "top_p": [one.top_p for one in sampling],
        "min_p": [one.min_p for one in sampling],
    }
