"""Hashes of a prompt's leading blocks, used to route requests to a verifier that has their prefix cached.

They are only a routing hint: a verifier's prefix cache matches tokens exactly.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

BLOCK_TOKENS = 64
MAX_BLOCKS = 32
"""Only the first 2048 tokens are hashed, which is enough to choose a verifier."""


def prefix_hashes(token_ids: Sequence[int], salt: str = "") -> tuple[int, ...]:
    """64-bit hashes of the first 1, 2, ... whole blocks of token ids below 2**32, and of the cache salt."""
    digest = hashlib.blake2b(salt.encode(), digest_size=8)
    hashes = []
    for end in range(BLOCK_TOKENS, min(len(token_ids), MAX_BLOCKS * BLOCK_TOKENS) + 1, BLOCK_TOKENS):
        digest.update(array("I", token_ids[end - BLOCK_TOKENS : end]).tobytes())
        hashes.append(int.from_bytes(digest.digest()))
    return tuple(hashes)
