"""Paged attention on CPU through SDPA: writes the new keys and values, gathers the context, attends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_core.engine.caches.kv_cache import PagedCache
from dspark_core.engine.target.batch import AttentionGroup


class PagedAttention:
    """`Attend` over a paged cache for one ragged batch."""

    def __init__(
        self, cache: PagedCache, slots: Tensor, groups: Callable[[int | None], Sequence[AttentionGroup]]
    ) -> None:
        """slots [tokens]; `groups` returns the batch's attention groups for a layer's window."""
        self._cache = cache
        self._slots = slots
        self._groups = groups
        self._windows: dict[tuple[int | None, int], list[tuple[AttentionGroup, Tensor]]] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [tokens, heads, head_dim]; k, v [tokens, kv_heads, head_dim] -> like q."""
        self._cache.write(layer, self._slots, k, v)
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        groups = self._biased_groups(self._cache.windows[layer], q.shape[1] // k.shape[1])
        if len(groups) == 1 and groups[0][0].query_rows.shape[0] == 1:
            group, bias = groups[0]
            return self._attend(group, bias, q[None], keys, values)[0]
        out = torch.empty_like(q)
        for group, bias in groups:
            attended = self._attend(group, bias, q[group.query_rows], keys, values)
            if group.query_mask is None:
                out[group.query_rows] = attended
            else:
                out[group.query_rows[group.query_mask]] = attended[group.query_mask]
        return out

    def _biased_groups(self, window: int | None, kv_groups: int) -> list[tuple[AttentionGroup, Tensor]]:
        """The groups, each with its bias repeated for `kv_groups` query heads per key/value head."""
        found = self._windows.get((window, kv_groups))
        if found is None:
            groups = self._groups(window)
            found = [(group, group.bias.repeat(1, 1, kv_groups, 1)) for group in groups]
            self._windows[window, kv_groups] = found
        return found

    def _attend(self, group: AttentionGroup, bias: Tensor, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """q [runs, queries, heads, head_dim] -> the same shape.

        The query heads that share a key/value head are folded into the query axis, so keys and
        values are never expanded.
        """
        runs, queries, heads, head_dim = q.shape
        kv_heads = keys.shape[1]
        folded = q.view(runs, queries, kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
        folded = folded.reshape(runs, kv_heads, -1, head_dim)
        context = group.context_slots.shape[1]
        slots = group.context_slots.flatten()
        k = keys.index_select(0, slots).view(runs, context, kv_heads, head_dim).transpose(1, 2)
        v = values.index_select(0, slots).view(runs, context, kv_heads, head_dim).transpose(1, 2)
        out = F.scaled_dot_product_attention(folded, k, v, attn_mask=bias)
        out = out.view(runs, kv_heads, -1, queries, head_dim).permute(0, 3, 1, 2, 4)
        return out.reshape(runs, queries, heads, head_dim)
