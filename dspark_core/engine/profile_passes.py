"""Passes as a profile times them: like those of serving, in memory as much as in shape.

A pass that reads the same pages again and again finds them in the processor's cache, and all requests
sharing pages would be one request's memory; served ones have pages of their own, which the passes in
between have pushed out. So page tables go round a pool of pages that were written before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from dspark_core.engine.batch import Run
from dspark_core.engine.greedy_draw import greedy_tokens

POOL_TOKENS = 4096
"""Positions written for a profile: at 32 requests of 128 each has its own."""
CHUNK_TOKENS = 256


class Passes(Protocol):
    """What a profile needs of a target engine."""

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
        self._pool = 0  # pages 1 ... _pool were written; page 0 is not for sequences
        self._next = 0

    def write_chunk(self) -> bool:
        """Computes one chunk of prompt into new pages: memory never written is no memory to read yet.

        False when the pool is complete.
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
        """Each request with the next pages of the pool."""
        return [
            Run([0] * count, context, self._pages(context + count), count)
            for count in _spread(tokens, requests)
        ]

    def verify(self, runs: Sequence[Run]) -> None:
        """A step as the round loop times it: the pass and the choice of tokens, until they are known.

        By what the round loop chooses with: after an operator of PyTorch's on many rows its threads spin
        for a while on the cores that the next pass computes on, which took up to 1.4 times as long.
        """
        greedy_tokens(self._engine.forward(runs)).tolist()

    def _pages(self, positions: int) -> list[int]:
        pool = self._pool or self._engine.num_pages - 1
        count = -(-positions // self._engine.page_tokens)
        table = [1 + (self._next + index) % pool for index in range(count)]
        self._next = (self._next + count) % pool
        return table


def _spread(tokens: int, requests: int) -> Sequence[int]:
    """As evenly as can be, larger ones first."""
    each, more = divmod(tokens, requests)
    return [each + 1] * more + [each] * (requests - more)
