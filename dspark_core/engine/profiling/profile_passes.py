"""Passes for profiling that resemble those of serving in their memory accesses as well as in shape.

A pass that reads the same pages repeatedly finds them in the processor's cache, and requests that share pages
read the memory of only one. When serving, each request has its own pages, which other passes have evicted
from the cache. So the page tables of successive passes cycle through a pool of pages that were written
before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from dspark_core.engine.target.batch import Run
from dspark_core.engine.verdicts.greedy_draw import greedy_tokens

POOL_TOKENS = 4096
"""Positions written for a profile: enough for 32 requests with 128 positions each."""
CHUNK_TOKENS = 256


class Passes(Protocol):
    """The target engine's methods that profiling needs."""

    @property
    def max_context_tokens(self) -> int: ...
    @property
    def page_tokens(self) -> int: ...
    @property
    def num_pages(self) -> int: ...
    def forward(self, runs: Sequence[Run]) -> Tensor: ...


class ProfilePasses:
    """Writes into arbitrary pages of the engine."""

    def __init__(self, engine: Passes) -> None:
        self._engine = engine
        self._pool = 0  # pages 1 ... _pool were written; page 0 is never used
        self._next = 0

    def write_chunk(self) -> bool:
        """Prefills one chunk into new pages: memory that was never written is not backed by real pages yet.

        Returns False when the pool is complete.
        """
        engine = self._engine
        most = min(engine.num_pages - 1, -(-POOL_TOKENS // engine.page_tokens))
        tokens = min(CHUNK_TOKENS, engine.max_context_tokens)
        pages = min(max(tokens // engine.page_tokens, 1), most - self._pool)
        if pages < 1:
            return False
        table = [self._pool + 1 + index for index in range(pages)]
        self._engine.forward([Run([0] * min(tokens, pages * engine.page_tokens), 0, table, 0)])
        self._pool += pages
        return self._pool < most

    def runs(self, requests: int, tokens: int, context: int) -> list[Run]:
        """One run per request, each with the next pages of the pool."""
        return [
            Run([0] * count, context, self._pages(context + count), count)
            for count in _spread(tokens, requests)
        ]

    def verify(self, runs: Sequence[Run]) -> None:
        """A step as the round loop times it: the pass and the choice of tokens, up to their values.

        Chooses tokens with the same code as the round loop. A PyTorch operator on many rows would leave
        threads spinning on the cores of the next pass, which then took up to 1.4 times as long.
        """
        greedy_tokens(self._engine.forward(runs)).tolist()

    def _pages(self, positions: int) -> list[int]:
        pool = self._pool or self._engine.num_pages - 1
        count = -(-positions // self._engine.page_tokens)
        table = [1 + (self._next + index) % pool for index in range(count)]
        self._next = (self._next + count) % pool
        return table


def _spread(tokens: int, requests: int) -> Sequence[int]:
    """As evenly as possible, larger shares first."""
    each, more = divmod(tokens, requests)
    return [each + 1] * more + [each] * (requests - more)
