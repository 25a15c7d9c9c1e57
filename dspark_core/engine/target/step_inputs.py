"""Packs a target step's inputs into one array of integers, so that a single copy takes them to the device.

A shape may be larger than the batch: padding writes to the page that no sequence owns, and is never read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dspark_core.engine.target.batch import RaggedBatch

NO_QUERY = 1 << 30
"""First query of a padding tile."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """Everything a step's kernels depend on, apart from the values of its inputs."""

    tokens: int
    rows: int
    """Rows of logits."""
    runs: int
    tiles: int
    tile_queries: int

    @property
    def fixed_values(self) -> int:
        """Number of integers before the page tables, whose length varies."""
        return 3 * self.tokens + self.rows + 4 * self.runs + 2 * self.tiles


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Views into the packed array."""

    token_ids: Tensor  # [tokens]
    positions: Tensor  # [tokens]
    slots: Tensor  # [tokens]
    logit_rows: Tensor  # [rows]
    runs: Tensor  # [runs, 4]: first row, tokens, first position, offset of its pages
    tiles: Tensor  # [tiles, 2]: run, first query
    pages: Tensor  # the rest of the array

    @classmethod
    def of(cls, values: Tensor, shape: StepShape) -> StepInputs:
        """values [fixed_values + pages] int64"""
        sizes = (shape.tokens, shape.tokens, shape.tokens, shape.rows, 4 * shape.runs, 2 * shape.tiles)
        ends = np.cumsum(sizes).tolist()
        parts = [values[end - size : end] for size, end in zip(sizes, ends, strict=True)]
        token_ids, positions, slots, logit_rows, runs, tiles = parts
        pages = values[shape.fixed_values :]
        return cls(token_ids, positions, slots, logit_rows, runs.view(-1, 4), tiles.view(-1, 2), pages)


def exact_shape(batch: RaggedBatch, tile_queries: int) -> StepShape:
    """The shape of a batch without padding."""
    counts = batch.run_table[:, 1].numpy()
    return StepShape(
        tokens=batch.num_tokens,
        rows=len(batch.logit_rows),
        runs=len(counts),
        tiles=int(num_tiles(counts, tile_queries).sum()),
        tile_queries=tile_queries,
    )


def filled_shape(requests: int, tokens: int, tile_queries: int) -> StepShape:
    """A shape that holds any batch of at most this many requests and tokens, with logits for every token.

    A run of n queries has at most 1 + (n - 1) / tile_queries tiles.
    """
    tiles = requests + max(0, tokens - requests) // tile_queries
    return StepShape(tokens=tokens, rows=tokens, runs=requests, tiles=tiles, tile_queries=tile_queries)


def pack_step(batch: RaggedBatch, shape: StepShape) -> Tensor:
    """Returns [fixed_values + the batch's pages] int64 on the CPU."""
    table = batch.run_table.numpy().astype(np.int64)
    tiles = tile_table(table[:, 1], shape.tile_queries)
    pages = batch.pages.numpy()
    packed = np.zeros(shape.fixed_values + len(pages), np.int64)
    views = StepInputs.of(torch.from_numpy(packed), shape)
    for column, values in (
        (views.token_ids, batch.token_ids),
        (views.positions, batch.positions),
        (views.slots, batch.slots),
        (views.logit_rows, batch.logit_rows),
        (views.runs, table),
        (views.tiles, tiles),
        (views.pages, pages),
    ):
        column.numpy()[: len(values)] = values
    views.tiles.numpy()[len(tiles) :] = (0, NO_QUERY)
    return torch.from_numpy(packed)


def num_tiles(counts: np.ndarray, tile_queries: int) -> np.ndarray:
    """counts [runs] -> tiles of each run."""
    tiles: np.ndarray = -(-counts // tile_queries)
    return tiles


def tile_table(counts: np.ndarray, tile_queries: int) -> np.ndarray:
    """counts [runs] -> [tiles, 2]: run, first query."""
    tiles = num_tiles(counts, tile_queries)
    run = np.repeat(np.arange(len(counts)), tiles)
    first = (np.arange(len(run)) - np.repeat(tiles.cumsum() - tiles, tiles)) * tile_queries
    return np.stack((run, first), axis=1)
