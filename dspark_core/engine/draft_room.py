"""For how many draft tokens of each sequence a round has room, in its batch and in the cache.

Known before anything is planned, from the lengths of blocks alone. What is cut off a plan instead depends on
how many tokens of others were planned for, that on a request's own tokens, and so whether a token is verified
on what it is (the causal barrier).
"""

from __future__ import annotations

from collections.abc import Sequence

from dspark_core.engine.block_manager import BlockManager
from dspark_core.engine.sequence import SequenceState


def within_batch(wanted: Sequence[int], room: int) -> Sequence[int]:
    """Of the draft tokens `wanted` by each at most `room` together, as even as can be; the first ones get
    what is left over."""
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
    """Of the draft tokens `wanted` by each those that pages are at hand for, together; the first ones come
    first. Every sequence holds its anchor's page already: drafts never preempt anyone."""
    spare, shares = manager.available_pages, []
    for sequence, length in zip(sequences, wanted, strict=True):
        held, end = len(sequence.pages), len(sequence.tokens)
        missing = max(manager.pages_for(end + length) - held, 0)
        if missing > spare:
            missing, length = spare, (held + spare) * manager.page_tokens - end
        spare -= missing
        shares.append(length)
    return shares
