"""Paged attention of ragged runs in plain PyTorch, run by run: the reference for the GPU kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def attend_runs(q, keys, values, where, window: int | None = None) -> Tensor:
    """Like `paged_attention`, but reads run lengths on the host; rows outside all runs are zero."""
    out = torch.zeros_like(q)
    group, page = q.shape[1] // keys.shape[1], where.page_tokens
    table = where.pages
    for row, count, start, offset in where.runs.tolist():
        if count == 0:
            continue
        end = start + count
        places = torch.arange(end)
        slots = table[offset + places // page] * page + places % page
        k, v = (cache[slots].float().repeat_interleave(group, dim=1) for cache in (keys, values))
        queries = torch.arange(start, end)[:, None]
        hidden = torch.zeros(count, end, dtype=torch.bool) if where.two_way else places > queries
        if window is not None:
            hidden = hidden | (places <= queries - window)
        scores = torch.einsum("qhd,khd->hqk", q[row : row + count].float(), k) * q.shape[2] ** -0.5
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        out[row : row + count] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
    return out


def store_runs(k, v, keys, values, slots) -> None:
    """Like `store_keys_values`."""
    keys[slots], values[slots] = k, v
