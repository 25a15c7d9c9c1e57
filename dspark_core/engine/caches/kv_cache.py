"""Paged storage of keys, values and projected context features, indexed by slot.

A slot is one token position: page * page_tokens + offset. Features are stored in the same pages as the keys
and values they belong to, so a prefix-cache hit includes them, and any drafter can be primed again without
recomputing the target.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_core.models.config import DecoderConfig


class PagedCache:
    """Keys and values for PyTorch's and Triton's attention; the native decoder has its own layout."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        num_pages: int,
        page_tokens: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        slots = num_pages * page_tokens
        kinds = [config.attention_kind(layer) for layer in range(config.num_cached_layers)]
        shapes = [(slots, kind.num_kv_heads, kind.head_dim) for kind in kinds]
        self.windows = [kind.window for kind in kinds]
        """By layer: number of positions a token sees, including its own; None: all."""
        # One tensor per layer, [slots, kv_heads, head_dim]: layers may differ.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]

    @staticmethod
    def bytes_per_page(config: DecoderConfig, page_tokens: int, feature_size: int, dtype: torch.dtype) -> int:
        """Bytes of keys, values and features together."""
        per_token = config.kv_values_per_token + feature_size
        return per_token * page_tokens * dtype.itemsize

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """slots [tokens]; k, v [tokens, kv_heads, head_dim]."""
        self.keys[layer].index_copy_(0, slots, k)
        self.values[layer].index_copy_(0, slots, v)


class PagedFeatures:
    """Projected context features."""

    def __init__(
        self,
        *,
        num_pages: int,
        page_tokens: int,
        size: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        self._rows = torch.zeros((num_pages * page_tokens, size), dtype=dtype, device=device)

    def write(self, slots: Tensor, features: Tensor) -> None:
        """slots [tokens]; features [tokens, size]."""
        self._rows.index_copy_(0, slots, features)

    def read(self, slots: Tensor) -> Tensor:
        """slots [tokens] -> a copy [tokens, size]."""
        return self._rows.index_select(0, slots)
