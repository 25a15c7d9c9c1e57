"""`Attend` over a paged cache by kernels that take ragged runs as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class RaggedRuns:
    """Where the runs of a batch are. int64 on the device."""

    runs: Tensor  # [runs, 4]: first row, queries, slot of the first one in its sequence, offset of its pages
    tiles: Tensor  # [tiles, 2]: run, first query
    pages: Tensor  # the runs' page tables one after the other
    tile_queries: int
    page_tokens: int
    two_way: bool = False
    """A run's queries see each other both ways, and not only what comes before."""


class AttentionKernels(Protocol):
    """`dspark_core.cuda.paged_attention` has them; tests put plain PyTorch in their place."""

    def tile_queries(self, longest_run: int, *, group: int, head_dim: int, value_bytes: int) -> int:
        """Queries of a tile: what the kernels are quick with, and a GPU has room for. `group`: query heads
        that share a key/value head; `value_bytes`: of one number of the cache."""
        ...

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, where: RaggedRuns, window: int | None
    ) -> Tensor:
        """q [tokens, heads, head_dim]; keys, values [slots, kv_heads, head_dim] -> like q."""
        ...

    def store(self, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """k, v [tokens, kv_heads, head_dim] into keys, values at slots [tokens]."""
        ...


class RaggedAttention:
    """Writes each layer's new keys and values, then attends to all the runs can see."""

    def __init__(
        self,
        kernels: AttentionKernels,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        windows: Sequence[int | None],
        slots: Tensor,
        where: RaggedRuns,
    ) -> None:
        """keys, values: by layer [slots, kv_heads, head_dim]; slots [tokens] of the new ones."""
        self._kernels = kernels
        self._keys, self._values, self._windows = keys, values, windows
        self._slots = slots
        self._where = where

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [tokens, heads, head_dim]; k, v [tokens, kv_heads, head_dim] -> like q."""
        keys, values = self._keys[layer], self._values[layer]
        self._kernels.store(k, v, keys, values, self._slots)
        return self._kernels.attend(q, keys, values, self._where, self._windows[layer])
