"""The input of one target pass over many sequences: their tokens, flattened without padding.

Every sequence contributes a run of consecutive positions: an anchor with its scheduled draft prefix, or a
prefill chunk. PyTorch's attention needs padded rectangles, so similar runs are grouped here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import torch
from torch import Tensor

from dspark_core.algorithms.transfer import to_device


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive positions [start, start + len(token_ids)) of one sequence."""

    token_ids: Sequence[int]
    start: int
    pages: Sequence[int]
    """The sequence's page table; covers every position of the run."""
    logit_rows: int
    """How many of the run's last tokens need a distribution."""
    sequence_id: str | None = None
    """For engines that keep state of a sequence between passes; None: nothing is kept."""


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Runs whose attention is computed in one call, padded to a rectangle."""

    query_rows: Tensor  # [runs, queries] index into the flattened tokens; padding repeats row 0
    query_mask: Tensor | None  # [runs, queries] True where not padding; None: no padding
    context_slots: Tensor  # [runs, context] cache slots of consecutive positions, from 0 without a window
    bias: Tensor  # [runs, 1, queries, context] 0 or -inf

    def to(self, device: torch.device) -> AttentionGroup:
        """Copies to `device` without synchronising."""
        if device.type == "cpu":
            return self
        mask = None if self.query_mask is None else to_device(self.query_mask, device)
        return AttentionGroup(
            to_device(self.query_rows, device),
            mask,
            to_device(self.context_slots, device),
            to_device(self.bias, device),
        )


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    token_ids: Tensor  # [tokens]
    positions: Tensor  # [tokens]
    slots: Tensor  # [tokens] where keys, values and features go
    logit_rows: Tensor  # [rows] index into the flattened tokens
    run_table: Tensor  # [runs, 4] int32: first row, tokens, first position, offset of its pages
    pages: Tensor  # int32, the runs' page tables up to their last positions, concatenated

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.shape[0])

    def to(self, device: torch.device) -> RaggedBatch:
        """Copies to `device` without synchronising."""
        if device.type == "cpu":
            return self
        columns = (self.token_ids, self.positions, self.slots, self.logit_rows, self.run_table, self.pages)
        return RaggedBatch(*(to_device(column, device) for column in columns))


MAX_GROUPED_QUERIES = 32
"""Longer runs are prefill chunks and get groups of their own: padding others to their length is wasteful."""

MAX_CONTEXT_PADDING = 2.0
"""Runs share a group while the longest context is at most this many times the shortest."""


FEW_TOKENS = 16
"""Up to this many tokens, Python numbers are faster than arrays, whose every operation costs microseconds."""


def build_batch(runs: Sequence[Run], *, page_tokens: int) -> RaggedBatch:
    """Flattens the runs in order. For many tokens, Python touches only each run, not each token."""
    if sum(len(run.token_ids) for run in runs) <= FEW_TOKENS:
        return _small_batch(runs, page_tokens)
    counts = _per_run(len(run.token_ids) for run in runs)
    starts = _per_run(run.start for run in runs)
    with_logits = _per_run(run.logit_rows for run in runs)
    first_rows = counts.cumsum() - counts
    tokens = int(counts.sum())
    rows = np.arange(tokens)
    positions = rows + np.repeat(starts - first_rows, counts)
    pages_used = (starts + counts - 1) // page_tokens + 1
    page_offsets = pages_used.cumsum() - pages_used
    tables = (run.pages[:used] for run, used in zip(runs, pages_used.tolist(), strict=True))
    pages = np.fromiter(chain.from_iterable(tables), np.int32, int(pages_used.sum()))
    page = pages[np.repeat(page_offsets, counts) + positions // page_tokens].astype(np.int64)
    ends = first_rows + counts
    logit_rows = np.arange(with_logits.sum()) + np.repeat(ends - with_logits.cumsum(), with_logits)
    token_ids = np.fromiter(chain.from_iterable(run.token_ids for run in runs), np.int64, tokens)
    table = np.stack((first_rows, counts, starts, page_offsets), axis=1).astype(np.int32)
    slots = page * page_tokens + positions % page_tokens
    return RaggedBatch(*map(torch.from_numpy, (token_ids, positions, slots, logit_rows, table, pages)))


def _small_batch(runs: Sequence[Run], page_tokens: int) -> RaggedBatch:
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    logit_rows: list[int] = []
    table: list[int] = []
    pages: list[int] = []
    for run in runs:
        first, end = len(token_ids), run.start + len(run.token_ids)
        table += (first, len(run.token_ids), run.start, len(pages))
        token_ids += run.token_ids
        positions += range(run.start, end)
        slots += [run.pages[p // page_tokens] * page_tokens + p % page_tokens for p in range(run.start, end)]
        pages += run.pages[: (end - 1) // page_tokens + 1]
        logit_rows += range(len(token_ids) - run.logit_rows, len(token_ids))
    longs = (np.array(values, np.int64) for values in (token_ids, positions, slots, logit_rows))
    ints = np.array(table, np.int32).reshape(len(runs), 4), np.array(pages, np.int32)
    return RaggedBatch(*map(torch.from_numpy, (*longs, *ints)))


def _per_run(values: Iterable[int]) -> np.ndarray:
    return np.fromiter(values, np.int64)


def slots_of(pages: Sequence[int], start: int, end: int, page_tokens: int) -> Tensor:
    """Slots of positions [start, end) of a sequence."""
    if end - start <= FEW_TOKENS:  # each operator would take longer than all of this
        slots = [pages[p // page_tokens] * page_tokens + p % page_tokens for p in range(start, end)]
        return torch.tensor(slots, dtype=torch.long)
    positions = torch.arange(start, end)
    first = start // page_tokens
    table = torch.tensor(pages[first : -(-end // page_tokens)], dtype=torch.long)
    return table[positions // page_tokens - first] * page_tokens + positions % page_tokens


def attention_groups(
    runs: Sequence[Run], *, page_tokens: int, dtype: torch.dtype, window: int | None = None
) -> tuple[AttentionGroup, ...]:
    """Groups runs for attention on padded rectangles; `dtype` is the bias's.

    `window`: positions a token sees, including its own; None: all before it. Leading slots that no token of a
    run sees are left out.
    """
    first_rows = [0, *accumulate(len(run.token_ids) for run in runs)]
    return tuple(
        _build_group([(runs[index], first_rows[index]) for index in members], page_tokens, dtype, window)
        for members in _group(runs, window)
    )


def _group(runs: Sequence[Run], window: int | None) -> list[list[int]]:
    """Indices of runs per group: short runs with contexts of similar length together, long runs alone."""
    contexts = [_context(run, window) for run in runs]
    singles = [[i] for i, run in enumerate(runs) if len(run.token_ids) > MAX_GROUPED_QUERIES]
    short = [i for i, run in enumerate(runs) if len(run.token_ids) <= MAX_GROUPED_QUERIES]
    short.sort(key=contexts.__getitem__)
    grouped: list[list[int]] = []
    for index in short:
        if grouped and contexts[index] <= MAX_CONTEXT_PADDING * contexts[grouped[-1][0]]:
            grouped[-1].append(index)
        else:
            grouped.append([index])
    return grouped + singles


def _context(run: Run, window: int | None) -> int:
    """Number of positions that any token of the run sees."""
    return run.start + len(run.token_ids) - _first_seen(run, window)


def _first_seen(run: Run, window: int | None) -> int:
    return 0 if window is None else max(0, run.start - window + 1)


def _build_group(
    members: Sequence[tuple[Run, int]], page_tokens: int, dtype: torch.dtype, window: int | None
) -> AttentionGroup:
    queries = max(len(run.token_ids) for run, _ in members)
    context = max(_context(run, window) for run, _ in members)
    firsts = torch.tensor([_first_seen(run, window) for run, _ in members])[:, None]
    seen = firsts + torch.arange(context)  # [runs, context] positions
    context_slots = _padded_slots([run for run, _ in members], seen, page_tokens)
    counts = torch.tensor([len(run.token_ids) for run, _ in members])[:, None]
    starts = torch.tensor([run.start for run, _ in members])[:, None]
    first_rows = torch.tensor([row for _, row in members])[:, None]
    columns = torch.arange(queries)
    real = columns < counts  # [runs, queries]
    query_rows = torch.where(real, first_rows + columns, 0)
    # A padding query sees one position: a row of only -inf would give NaN.
    last_visible = torch.where(real, starts + columns, firsts)[:, :, None]  # [runs, queries, 1]
    visible = seen[:, None] <= last_visible
    if window is not None:
        visible &= seen[:, None] > last_visible - window
    bias = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))
    return AttentionGroup(query_rows, None if bool(real.all()) else real, context_slots, bias[:, None])


def _padded_slots(runs: Sequence[Run], positions: Tensor, page_tokens: int) -> Tensor:
    """Cache slots of `positions` [runs, context]; beyond a run's pages, slots of page 0."""
    num_pages = int(positions.max()) // page_tokens + 1
    pages = torch.tensor(
        [[*run.pages[:num_pages], *(0 for _ in range(num_pages - len(run.pages)))] for run in runs]
    )
    return pages.gather(1, positions // page_tokens) * page_tokens + positions % page_tokens
