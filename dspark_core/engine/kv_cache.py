"""Paged storage of keys, values and projected context features, indexed by slot.

A slot is one token position: page * page_tokens + offset. Features live beside the keys and
values they belong to: a prefix-cache hit brings them along, and any drafter can be primed again
from them without recomputing the target.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_core.models.config import DecoderConfig


class PagedCache:
    def __init__(
        self,
        config: DecoderConfig,
        *,
        num_pages: int,
        page_tokens: int,
        feature_size: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        slots = num_pages * page_tokens
        shape = (config.num_layers, slots, config.num_kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # [layers, slots, kv_heads, head_dim]
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.features = torch.zeros((slots, feature_size), dtype=dtype, device=device)
        self.num_pages = num_pages
        self.page_tokens = page_tokens

    @staticmethod
    def bytes_per_page(config: DecoderConfig, page_tokens: int, feature_size: int, dtype: torch.dtype) -> int:
        per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim + feature_size
        return per_token * page_tokens * dtype.itemsize

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """slots [tokens]; k, v [tokens, kv_heads, head_dim]."""
        self.keys[layer].index_copy_(0, slots, k)
        self.values[layer].index_copy_(0, slots, v)

    def write_features(self, slots: Tensor, features: Tensor) -> None:
        """slots [tokens]; features [tokens, feature_size]."""
        self.features.index_copy_(0, slots, features)

    def read_features(self, slots: Tensor) -> Tensor:
        """slots [tokens] -> a copy [tokens, feature_size]."""
        return self.features.index_select(0, slots)
