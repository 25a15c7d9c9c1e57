"""`Attend` over a paged cache with kernels that take ragged runs without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class RaggedRuns:
    """Layout of a batch's runs. Tensors are int64 on the device."""

    runs: Tensor  # [runs, 4]: first row, queries, slot of the first one in its sequence, offset of its pages
    tiles: Tensor  # [tiles, 2]: run, first query
    pages: Tensor  # the runs' page tables, concatenated
    tile_queries: int
    page_tokens: int
    two_way: bool = False
    """Attention within a run is bidirectional instead of causal."""


class AttentionKernels(Protocol):
    """Implemented by `dspark_core.cuda.paged_attention`; tests substitute plain PyTorch."""

    def tile_queries(self, longest_run: int, *, group: int, head_dim: int, value_bytes: int) -> int:
        """Queries per tile with which the kernels are fast and that fit the GPU. `group`: query heads that
        share a key/value head; `value_bytes`: size of one cached number."""
        ...

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, where: RaggedRuns, window: int | None
    ) -> Tensor:
        """q [tokens, heads, head_dim]; keys, values [slots, kv_heads, head_dim] -> like q."""
        ...

    def store(self, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Writes k, v [tokens, kv_heads, head_dim] to keys, values at slots [tokens]."""
        ...


class RaggedAttention:
    """Writes each layer's new keys and values, then attends."""

    def __init__(
        self,
        kernels: AttentionKernels,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        windows: Sequence[int | None],
        slots: Tensor,
        where: RaggedRuns,
    ) -> None:
        """keys, values by layer [slots, kv_heads, head_dim]; slots [tokens] for the new ones."""
        self._kernels = kernels
        self._keys, self._values, self._windows = keys, values, windows
        self._slots = slots
        self._where = where

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [tokens, heads, head_dim]; k, v [tokens, kv_heads, head_dim] -> like q."""
        keys, values = self._keys[layer], self._values[layer]
        self._kernels.store(k, v, keys, values, self._slots)
        return self._kernels.attend(q, keys, values, self._where, self._windows[layer])
