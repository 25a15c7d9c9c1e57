"""Chooses attention tile sizes that fit a GPU. Numbers only: no kernel, no triton.

A program keeps its tile's queries and the keys and values it works on in shared memory, of which an L4 or a
GeForce has less than half of what an H100 has. A kernel that exceeds it cannot be launched.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

MAX_SPLITS = 64
"""Enough for one sequence with eight key/value heads to occupy a large GPU."""
COMBINED_AT_A_TIME = 16
"""Partial results added at a time: with all at once, the largest heads spill registers."""
LEAST_ROWS = 16
"""Minimum rows of a tensor core product."""
SMALLEST_SHARED_BYTES = 99 * 1024
"""Shared memory per block of the GPUs since Ampere that have the least."""
_WARPS_BYTES = 64 * 128 * 2
"""Size of a tile's queries from which four warps have too few registers."""
SPARE_BYTES = 4096
"""Margin for shared memory added by the compiler, which varies between versions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Sizes that affect only speed. Chosen by reasoning; `benchmarks.gpu` tries others."""

    max_rows: int = 64
    """Queries times heads of a group, per tile. Halved for float32; reduced to fit shared memory."""
    programs_wanted: int = 512
    """About four per multiprocessor of a large GPU; with fewer it is partly idle."""
    stage_bytes: int = 1 << 14
    """Bytes of keys loaded at a time by eight warps, half as many for float32. More, or as many by four
    warps, spill registers."""
    stages: int = 2
    """Reduced if even the fewest rows do not fit with this many."""


TUNING = Tuning()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Compile-time parameters of a kernel."""

    rows: int
    head_size: int
    """Elements per row: the head size, padded to a power of two."""
    keys: int
    """Keys processed at a time."""
    warps: int
    stages: int

    def shared_bytes(self, value_bytes: int) -> int:
        """Layout of Triton 3.9: queries, keys and values of the loads in flight, weights.

        Hopper's own products need twice the keys and values, but Hopper has more than twice the room.
        """
        row = self.head_size * value_bytes
        loads = max(1, 2 * (self.stages - 1)) * self.keys * row
        return self.rows * row + loads + self.rows * (self.keys * value_bytes + 4)


@cache
def tile_of(rows: int, head_dim: int, value_bytes: int, shared_bytes: int, tuning: Tuning = TUNING) -> Tile:
    """The tile for a number of rows, with as many stages as fit."""
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
    """Queries per tile: a power of two, limited by `max_rows`, shared memory and the longest run."""
    rows_of_one = power_of_two(group)
    most = _max_rows(rows_of_one, head_dim, value_bytes, shared_bytes, tuning) // rows_of_one
    return max(1, min(power_of_two(longest_run), most))


def num_splits(tiles: int, kv_heads: int, tuning: Tuning = TUNING) -> int:
    """Number of programs that share a tile's context: a power of two."""
    wanted = tuning.programs_wanted // max(1, tiles * kv_heads)
    return max(1, min(MAX_SPLITS, 1 << max(0, wanted.bit_length() - 1)))


def shared_bytes_of(device: torch.device) -> int:
    """Shared memory available per block. PyTorch reports it since 2.7; otherwise assumes the smallest."""
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", SMALLEST_SHARED_BYTES))


def power_of_two(number: int) -> int:
    """The smallest power of two >= `number`."""
    return 1 << (number - 1).bit_length()


@cache
def _max_rows(rows_of_one: int, head_dim: int, value_bytes: int, shared_bytes: int, tuning: Tuning) -> int:
    """Reduces rows before stages: with a single stage, nothing is loaded during products. If nothing fits,
    returns the minimum, and the launch reports what is missing."""
    least = max(LEAST_ROWS, rows_of_one)
    for stages in range(tuning.stages, 0, -1):
        rows = tuning.max_rows // _width(value_bytes)
        while rows >= least:
            if _fits(_tile(rows, head_dim, value_bytes, stages, tuning), value_bytes, shared_bytes):
                return rows
            rows //= 2
    return least


def _width(value_bytes: int) -> int:
    """Operand width relative to bfloat16: tensor cores do not multiply float32, so operands use registers."""
    return max(1, value_bytes // 2)


def _fits(tile: Tile, value_bytes: int, shared_bytes: int) -> bool:
    return tile.shared_bytes(value_bytes) + SPARE_BYTES <= shared_bytes


def _tile(rows: int, head_dim: int, value_bytes: int, stages: int, tuning: Tuning) -> Tile:
    rows, head_size = max(LEAST_ROWS, rows), max(16, power_of_two(head_dim))
    row = head_size * value_bytes
    warps = 8 if rows * row >= _WARPS_BYTES else 4
    keys = tuning.stage_bytes // _width(value_bytes) * warps // 8 // row
    return Tile(rows=rows, head_size=head_size, keys=max(16, min(64, keys)), warps=warps, stages=stages)
