"""How attention is cut into tiles, by what a GPU has room for. Numbers only: no kernel, no triton.

A program keeps its tile's queries and the keys and values it works on in shared memory, of which an L4 or a
GeForce has less than half of what an H100 has. What does not fit there cannot be launched.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

MAX_SPLITS = 64
"""With eight key/value heads, what one sequence needs to give a large GPU work."""
COMBINED_AT_A_TIME = 16
"""Parts of a row that are added up together: of all, the largest heads spill registers."""
LEAST_ROWS = 16
"""Of a tensor core's product."""
SMALLEST_SHARED_BYTES = 99 * 1024
"""Of a block, on the GPUs since Ampere that have least of it."""
_WARPS_BYTES = 64 * 128 * 2
"""Of a tile's queries, from which on four warps have too few registers."""
SPARE_BYTES = 4096
"""Compilers differ in what they add."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Sizes that change speed and nothing else. Chosen by reasoning; `benchmarks.gpu` tries others."""

    max_rows: int = 64
    """Of a tile: its queries times the heads of a group. Half of it in float32; fewer where they do not fit
    the shared memory."""
    programs_wanted: int = 512
    """About four to a multiprocessor of a large GPU; fewer leave it idle."""
    stage_bytes: int = 1 << 14
    """Of keys loaded at a time by eight warps, half of it in float32: more, or as many by four, spill
    registers."""
    stages: int = 2
    """Fewer where not even the fewest rows fit with so many."""


TUNING = Tuning()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """What a kernel is compiled for."""

    rows: int
    head_size: int
    """Values of a row: those of a head, filled up."""
    keys: int
    """Worked on at a time."""
    warps: int
    stages: int

    def shared_bytes(self, value_bytes: int) -> int:
        """As Triton 3.9 lays them out: queries, keys and values of the loads that are under way, weights.

        For Hopper's own products it takes twice the keys and values, and there is more than twice the room.
        """
        row = self.head_size * value_bytes
        loads = max(1, 2 * (self.stages - 1)) * self.keys * row
        return self.rows * row + loads + self.rows * (self.keys * value_bytes + 4)


@cache
def tile_of(rows: int, head_dim: int, value_bytes: int, shared_bytes: int, tuning: Tuning = TUNING) -> Tile:
    """For so many rows, with as many stages as fit."""
    for stages in range(tuning.stages, 1, -1):
        tile = _tile(rows, head_dim, value_bytes, stages, tuning)
        if _fits(tile, value_bytes, shared_bytes):
            return tile
    return _tile(rows, head_dim, value_bytes, 1, tuning)


def tile_queries(
    longest_run: int,
    *,
    group: int,
    head_dim: int,
    value_bytes: int,
    shared_bytes: int = SMALLEST_SHARED_BYTES,
    tuning: Tuning = TUNING,
) -> int:
    """Queries of a tile: a power of two, as many as its rows allow, the memory holds and a run needs."""
    rows_of_one = power_of_two(group)
    most = _most_rows(rows_of_one, head_dim, value_bytes, shared_bytes, tuning) // rows_of_one
    return max(1, min(power_of_two(longest_run), most))


def num_splits(tiles: int, kv_heads: int, tuning: Tuning = TUNING) -> int:
    """Programs that share a tile's context: a power of two."""
    wanted = tuning.programs_wanted // max(1, tiles * kv_heads)
    return max(1, min(MAX_SPLITS, 1 << max(0, wanted.bit_length() - 1)))


def shared_bytes_of(device: torch.device) -> int:
    """What a block may have. PyTorch tells since 2.7; with an older one, as on the smallest GPUs."""
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", SMALLEST_SHARED_BYTES))


def power_of_two(number: int) -> int:
    """The smallest that is no less."""
    return 1 << (number - 1).bit_length()


@cache
def _most_rows(rows_of_one: int, head_dim: int, value_bytes: int, shared_bytes: int, tuning: Tuning) -> int:
    """Rows are given up before stages: with one, nothing is loaded while products are computed. Where
    nothing fits, the fewest: the launch then says what is missing."""
    least = max(LEAST_ROWS, rows_of_one)
    for stages in range(tuning.stages, 0, -1):
        rows = tuning.max_rows // _width(value_bytes)
        while rows >= least:
            if _fits(_tile(rows, head_dim, value_bytes, stages, tuning), value_bytes, shared_bytes):
                return rows
            rows //= 2
    return least


def _width(value_bytes: int) -> int:
    """Of operands, in bfloat16's: those of float32, which no tensor core multiplies, lie in registers."""
    return max(1, value_bytes // 2)


def _fits(tile: Tile, value_bytes: int, shared_bytes: int) -> bool:
    return tile.shared_bytes(value_bytes) + SPARE_BYTES <= shared_bytes


def _tile(rows: int, head_dim: int, value_bytes: int, stages: int, tuning: Tuning) -> Tile:
    rows, head_size = max(LEAST_ROWS, rows), max(16, power_of_two(head_dim))
    row = head_size * value_bytes
    warps = 8 if rows * row >= _WARPS_BYTES else 4
    keys = tuning.stage_bytes // _width(value_bytes) * warps // 8 // row
    return Tile(rows=rows, head_size=head_size, keys=max(16, min(64, keys)), warps=warps, stages=stages)
