"""Attention of ragged runs over a paged cache: no padding, no gathering, no host synchronisation.

A run is a range of consecutive positions of one sequence: an anchor with its drafts, a prompt chunk, or a
draft block. It is cut into tiles of queries; query heads that share a key/value head are rows of the
same tile, so that keys and values are read once for all of them. If there are few tiles, each sequence's
context is split among several programs, and a second kernel combines their partial results.

Grids depend on shapes only, never on lengths, so a CUDA graph stays valid for any lengths.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspark_core.cuda.tiles import (
    COMBINED_AT_A_TIME,
    MAX_SPLITS,
    SMALLEST_SHARED_BYTES,
    TUNING,
    Tuning,
    num_splits,
    power_of_two,
    shared_bytes_of,
    tile_of,
    tile_queries,
)

_LOG2_E = 1.4426950408889634


class RaggedRuns(Protocol):
    """Where the runs of a batch are. All tensors are int64 and on the device."""

    @property
    def runs(self) -> Tensor:
        """[runs, 4]: first row, queries, slot of the first one in its sequence, offset of its page table"""
        ...

    @property
    def tiles(self) -> Tensor:
        """[tiles, 2]: run, first query; a tile that starts past the run's queries does nothing"""
        ...

    @property
    def pages(self) -> Tensor:
        """Concatenated page tables of the runs."""
        ...

    @property
    def tile_queries(self) -> int: ...

    @property
    def page_tokens(self) -> int: ...

    @property
    def two_way(self) -> bool:
        """Whether a run's queries attend to each other bidirectionally instead of causally."""
        ...


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    where: RaggedRuns,
    window: int | None = None,
    tuning: Tuning = TUNING,
    shared_bytes: int = SMALLEST_SHARED_BYTES,
) -> Tensor:
    """q [tokens, heads, head_dim]; keys, values [slots, kv_heads, head_dim] -> like q.

    `window`: positions a token attends to, including its own; None: all preceding. `shared_bytes`: shared
    memory per block for which the tiles were cut. Rows that belong to no run are undefined.
    """
    tokens, heads, head_dim = q.shape
    kv_heads, tiles = keys.shape[1], where.tiles.shape[0]
    group, splits = heads // kv_heads, num_splits(tiles, kv_heads, tuning)
    rows = power_of_two(where.tile_queries * group)
    tile = tile_of(rows, head_dim, keys.element_size(), shared_bytes, tuning)
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    partial, sums = out, out
    if splits > 1:
        partial = torch.empty((splits, tokens, heads, head_dim), dtype=torch.float32, device=q.device)
        sums = torch.empty((splits, tokens, heads), dtype=torch.float32, device=q.device)
    _attend[(tiles, kv_heads, splits)](
        q,
        keys,
        values,
        partial,
        sums,
        where.tiles,
        where.runs,
        where.pages,
        head_dim**-0.5 * _LOG2_E,
        q.stride(0),
        q.stride(1),
        keys.stride(0),
        keys.stride(1),
        tokens,
        splits,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=tile.head_size,
        PAGE=where.page_tokens,
        TILE=where.tile_queries,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        WINDOW=window or 0,
        TWO_WAY=where.two_way,
        SPLIT=splits > 1,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    if splits > 1:
        sizes = {"HEAD_DIM": head_dim, "BLOCK_D": tile.head_size}
        sizes |= {"MOST": MAX_SPLITS, "PARTS": COMBINED_AT_A_TIME}
        _combine[(tokens, heads)](partial, sums, out, tokens, splits, **sizes, enable_fp_fusion=True)
    return out


def store_keys_values(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """k, v [tokens, kv_heads, head_dim] into keys, values [slots, kv_heads, head_dim] at slots [tokens]."""
    tokens, kv_heads, head_dim = k.shape
    if tokens == 0:
        return
    _store[(tokens,)](
        k,
        v,
        keys,
        values,
        slots,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        keys.stride(0),
        keys.stride(1),
        HEADS=kv_heads,
        BLOCK_H=triton.next_power_of_2(kv_heads),
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        enable_fp_fusion=True,
    )


class TritonKernels:
    """The functions above, as the interface the engine uses."""

    def __init__(self, tuning: Tuning = TUNING, shared_bytes: int = SMALLEST_SHARED_BYTES) -> None:
        self._tuning = tuning
        self._shared_bytes = shared_bytes

    @classmethod
    def on(cls, device: torch.device, tuning: Tuning = TUNING) -> TritonKernels:
        """Uses tiles as large as the device's shared memory allows."""
        return cls(tuning, shared_bytes_of(device))

    def tile_queries(self, longest_run: int, *, group: int, head_dim: int, value_bytes: int) -> int:
        return tile_queries(
            longest_run,
            group=group,
            head_dim=head_dim,
            value_bytes=value_bytes,
            shared_bytes=self._shared_bytes,
            tuning=self._tuning,
        )

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, where: RaggedRuns, window: int | None
    ) -> Tensor:
        with _launching_on(q):
            return paged_attention(q, keys, values, where, window, self._tuning, self._shared_bytes)

    def store(self, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        with _launching_on(k):
            store_keys_values(k, v, keys, values, slots)


def _launching_on(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, regardless of where its tensors are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit(do_not_specialize=["tokens", "splits"], do_not_specialize_on_alignment=["tiles", "runs", "pages"])
def _attend(
    q,
    keys,
    values,
    partial,
    sums,
    tiles,
    runs,
    pages,
    scale,
    q_token,
    q_head,
    kv_slot,
    kv_head_stride,
    tokens,
    splits,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    TWO_WAY: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Computes one tile of queries for one key/value head over one part of the context."""
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    run = runs + tl.load(tiles + 2 * tile) * 4
    first_query = tl.load(tiles + 2 * tile + 1)
    count, start = tl.load(run + 1), tl.load(run + 2)
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    query = first_query + rows // GROUP
    real = (rows < TILE * GROUP) & (query < count)
    token = tl.load(run) + query
    head = kv_head * GROUP + rows % GROUP
    row_mask = real[:, None] & (columns < HEAD_DIM)[None, :]
    asked = tl.load(q + token[:, None] * q_token + head[:, None] * q_head + columns[None, :], row_mask, 0.0)
    begin, past = _part(first_query, count, start, split, splits, TILE, BLOCK_N, WINDOW, TWO_WAY)
    table, offset = pages + tl.load(run + 3), kv_head * kv_head_stride
    out, highest, total = _softmax_sums(
        asked, keys + offset, values + offset, table, start + query, real, begin, past, scale, kv_slot,
        HEAD_DIM, BLOCK_D, PAGE, BLOCK_M, BLOCK_N, WINDOW, TWO_WAY,
    )  # fmt: skip
    safe_total = tl.where(total > 0, total, 1.0)
    out = out / safe_total[:, None]
    cell = (split.to(tl.int64) * tokens + token) * (tl.num_programs(1) * GROUP) + head
    place = cell[:, None] * HEAD_DIM + columns[None, :]
    if SPLIT:  # rows that attend to nothing in this part write no result
        row_mask = row_mask & (total > 0)[:, None]
    tl.store(partial + place, out.to(partial.dtype.element_ty), row_mask)
    if SPLIT:
        tl.store(sums + cell, tl.where(total > 0, highest + tl.log2(safe_total), float("-inf")), real)


@triton.jit
def _softmax_sums(
    asked,
    keys,
    values,
    table,
    position,
    real,
    begin,
    past,
    scale,
    kv_slot,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    TWO_WAY: tl.constexpr,
):
    """Over slots [begin, past), per row: weighted values, the highest score and the sum of the weights.

    Online softmax: weights are relative to the highest score so far. `table`: the sequence's pages.
    """
    columns = tl.arange(0, BLOCK_D)
    inside = columns < HEAD_DIM
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in range(begin, past, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        held = key < past
        place = (tl.load(table + key // PAGE, held, 0) * PAGE + key % PAGE) * kv_slot
        k = tl.load(keys + place[None, :] + columns[:, None], held[None, :] & inside[:, None], 0.0)
        scores = tl.dot(asked, k, input_precision="ieee") * scale
        seen = _sees(position[:, None], key[None, :], WINDOW, TWO_WAY) & real[:, None] & held[None, :]
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        fading = tl.exp2(highest - base)
        total = total * fading + tl.sum(weights, 1)
        v = tl.load(values + place[:, None] + columns[None, :], held[:, None] & inside[None, :], 0.0)
        out = out * fading[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        highest = higher
    return out, highest, total


@triton.jit
def _part(
    first_query,
    count,
    start,
    split,
    splits,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    TWO_WAY: tl.constexpr,
):
    """Slots [begin, past) of its sequence that one program of a tile processes."""
    past = start + count
    if not TWO_WAY:
        past = start + tl.minimum(first_query + TILE, count)
    past = tl.where(first_query < count, past, 0)
    begin = past * 0
    if WINDOW > 0:
        begin = tl.minimum(tl.maximum(start + first_query - WINDOW + 1, 0), past)
    per_split = tl.cdiv(tl.cdiv(past - begin, BLOCK_N), splits) * BLOCK_N
    begin += split * per_split
    return begin, tl.minimum(past, begin + per_split)


@triton.jit
def _sees(position, key, WINDOW: tl.constexpr, TWO_WAY: tl.constexpr):
    """Whether a query at `position` attends to the key in slot `key`."""
    seen = key >= 0
    if not TWO_WAY:
        seen = key <= position
    if WINDOW > 0:
        seen = seen & (key > position - WINDOW)
    return seen


@triton.jit(do_not_specialize=["tokens", "splits"])
def _combine(
    partial,
    sums,
    out,
    tokens,
    splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MOST: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Combines the partial results of one token's head, weighted by their shares of the softmax sum."""
    token, head = tl.program_id(0), tl.program_id(1)
    heads = tl.num_programs(1)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < HEAD_DIM
    every = tl.arange(0, MOST).to(tl.int64)
    of_every = tl.load(sums + (every * tokens + token) * heads + head, every < splits, float("-inf"))
    most = tl.max(of_every, 0)
    base = tl.where(most == float("-inf"), 0.0, most)
    total = tl.sum(tl.exp2(of_every - base), 0)
    mixed = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, splits, PARTS):
        split = first + tl.arange(0, PARTS).to(tl.int64)
        cell = (split * tokens + token) * heads + head
        shares = tl.load(sums + cell, split < splits, float("-inf"))
        mask = (shares > float("-inf"))[:, None] & inside[None, :]
        parts = tl.load(partial + cell[:, None] * HEAD_DIM + columns[None, :], mask, 0.0)
        mixed += tl.sum(parts * tl.exp2(shares - base)[:, None], 0)
    mixed = mixed / tl.where(total > 0, total, 1.0)
    place = (token.to(tl.int64) * heads + head) * HEAD_DIM
    tl.store(out + place + columns, mixed.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _store(
    k,
    v,
    keys,
    values,
    slots,
    k_token,
    k_head,
    v_token,
    v_head,
    kv_slot,
    kv_head_stride,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Stores one token's keys and values in its slot."""
    token = tl.program_id(0)
    head, column = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (head < HEADS) & (column < HEAD_DIM)
    place = tl.load(slots + token) * kv_slot + head * kv_head_stride + column
    tl.store(keys + place, tl.load(k + token * k_token + head * k_head + column, inside), inside)
    tl.store(values + place, tl.load(v + token * v_token + head * v_head + column, inside), inside)
