"""Sizes to which batches are padded, so that a few CUDA graphs serve batches of any size.

Values only. A graph is valid for one shape; lengths and positions are part of its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from dspark_core.errors import ConfigError

LOOKUP_REQUESTS = 16
"""Most sequences that can each verify a whole looked-up block in one graph. More hardly ever do, and each
needs memory for its rows of logits."""


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """Room for this many sequences and tokens."""

    requests: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketGrid:
    requests: tuple[int, ...]
    tokens_per_request: tuple[int, ...]
    max_tokens: int
    """Larger batches run without a graph: launch overhead is a small part of their time."""

    def __post_init__(self) -> None:
        for name in ("requests", "tokens_per_request"):
            values = getattr(self, name)
            if not values or values[0] < 1 or any(a >= b for a, b in pairwise(values)):
                raise ConfigError(f"{name} of buckets must be >= 1 and increasing, got {values}")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens of buckets must be >= 1, got {self.max_tokens}")

    def choose(self, requests: int, tokens: int, longest: int = 1) -> Bucket | None:
        """The bucket that wastes the fewest tokens.

        None if the batch is too large for any, or its `longest` run is a prefill chunk, which needs larger
        tiles and logits of at most one row.
        """
        if longest > self.tokens_per_request[-1]:
            return None
        fitting = [b for b in self.all() if b.requests >= requests and b.tokens >= tokens]
        return min(fitting, key=lambda bucket: (bucket.tokens, bucket.requests), default=None)

    def holding(self, requests: int) -> Sequence[Bucket]:
        """All buckets that `choose` may return for batches of up to `requests` sequences, largest first."""
        each = self.tokens_per_request[-1]
        # The choice changes only where a bucket's room ends, so testing these sizes is enough.
        counts = {min(count, requests) for count in self.requests}
        sizes = {1, *(bucket.tokens + 1 for bucket in self.all())}
        asked = [(count, size) for count in counts for size in sizes if size <= count * each]
        chosen = {bucket for one in asked if (bucket := self.choose(*one)) is not None}
        return sorted(chosen, key=lambda bucket: (bucket.tokens, bucket.requests), reverse=True)

    def all(self) -> Sequence[Bucket]:
        sizes = {(r, r * t) for r in self.requests for t in self.tokens_per_request}
        return [Bucket(r, tokens) for r, tokens in sorted(sizes) if tokens <= self.max_tokens]


def powers_of_two(largest: int) -> tuple[int, ...]:
    """1, 2, 4, ..., and `largest` itself."""
    below = tuple(1 << n for n in range(largest.bit_length()) if 1 << n < largest)
    return (*below, largest)


def default_grid(max_requests: int, block_size: int | None, looked_up: int | None = None) -> BucketGrid:
    """For decoding with drafter blocks of `block_size` tokens and looked-up blocks of `looked_up` tokens;
    None: no such blocks."""
    longest = [1 + drafts for drafts in (block_size, looked_up) if drafts is not None]
    each = {1, *longest} | {few for few in (2, 3, 4, 6) if few < max(longest, default=1)}
    max_tokens = max_requests * (1 + (block_size or 0))
    if looked_up is not None:
        max_tokens = max(max_tokens, min(max_requests, LOOKUP_REQUESTS) * (1 + looked_up))
    return BucketGrid(
        requests=powers_of_two(max_requests), tokens_per_request=tuple(sorted(each)), max_tokens=max_tokens
    )
