"""How many draft tokens of each sequence fit a round, in its batch and in the KV cache.

Determined before planning, from block lengths alone. If a finished plan were cut instead, whether a token is
verified would depend on the other requests' verify lengths, and through them on the token itself (the causal
barrier).
"""

from __future__ import annotations

from collections.abc import Sequence

from dspark_core.engine.caches.block_manager import BlockManager
from dspark_core.engine.sequence import SequenceState


def within_batch(wanted: Sequence[int], room: int) -> Sequence[int]:
    """Grants at most `room` of the `wanted` draft tokens, distributed as evenly as possible; the remainder
    goes to the first sequences."""
    if sum(wanted) <= room:
        return wanted
    left, level = max(room, 0), 0
    for granted, length in enumerate(sorted(wanted)):
        waiting = len(wanted) - granted
        level = left // waiting
        if length > level:
            break
        left -= length
    shares = [min(length, level) for length in wanted]
    spare = max(room, 0) - sum(shares)
    for place, length in enumerate(wanted):
        if spare and length > shares[place]:
            shares[place] += 1
            spare -= 1
    return shares


def within_pages(
    sequences: Sequence[SequenceState], wanted: Sequence[int], manager: BlockManager
) -> Sequence[int]:
    """Grants the `wanted` draft tokens for which pages are available, first come, first served. Every
    sequence already holds its anchor's page; drafts never preempt anyone."""
    spare, shares = manager.available_pages, []
    for sequence, length in zip(sequences, wanted, strict=True):
        held, end = len(sequence.pages), len(sequence.tokens)
        missing = max(manager.pages_for(end + length) - held, 0)
        if missing > spare:
            missing, length = spare, (held + spare) * manager.page_tokens - end
        spare -= missing
        shares.append(length)
    return shares
