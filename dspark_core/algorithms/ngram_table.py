"""Predicts the most likely next token from the last few, by an n-gram table of the target's own answers.

Contexts of one to `order` tokens share one open-addressing hash table; each entry holds the most likely
next token and how likely it is. The longest known context decides (backing off, as in n-gram models);
probabilities were interpolated when the table was built, so lookup does no arithmetic.
Drafting from a fixed text store is due to REST (arXiv 2311.08252). Values only, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark_core.algorithms.lookup_evidence import LookupEvidence, prior_rates
from dspark_core.algorithms.splitmix import MIX_1, MIX_2, WEYL

MAX_ORDER = 8
LEVELS = 256
"""Probabilities are quantised to this many levels, finer towards 1; see `levels_of`."""
_MASK = 0xFFFF_FFFF_FFFF_FFFF

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class NgramTable:
    """`checks`, `tokens` and `levels` [slots]; a check of 0 marks an empty slot."""

    order: int
    """Longest context, in tokens."""
    checks: npt.NDArray[np.uint16]
    """Hash bits that distinguish a context from those in neighbouring slots. About one lookup in ten
    thousand matches a wrong entry, which costs at worst a rejected draft token."""
    tokens: npt.NDArray[np.uint32]
    levels: npt.NDArray[np.uint8]
    evidence: LookupEvidence
    """Acceptance rates of its tokens, alone and next to a match in the request's own text."""

    def __post_init__(self) -> None:
        """Raises ValueError for inconsistent parts."""
        slots = len(self.checks)
        if not 1 <= self.order <= MAX_ORDER:
            raise ValueError(f"order must be in [1, {MAX_ORDER}], got {self.order}")
        if (len(self.tokens), len(self.levels)) != (slots, slots):
            raise ValueError(
                f"checks, tokens and levels must be of one length, got {slots}, {len(self.tokens)} "
                f"and {len(self.levels)}"
            )
        if self.checks.all():
            raise ValueError("a table without an empty slot would be searched without end")

    @property
    def entries(self) -> int:
        return int(np.count_nonzero(self.checks))

    def find(self, tail: Sequence[int]) -> tuple[int, int] | None:
        """The most likely token after `tail` and its level; None if not even the last token is known."""
        for length in range(min(self.order, len(tail)), 0, -1):
            found = self._entry(tail[len(tail) - length :])
            if found is not None:
                return found
        return None

    def _entry(self, context: Sequence[int]) -> tuple[int, int] | None:
        key = context_key(context)
        slots = len(self.checks)
        slot, check = (key >> 32) * slots >> 32, key & 0xFFFF or 1
        while (here := int(self.checks[slot])) != 0:
            if here == check:
                return int(self.tokens[slot]), int(self.levels[slot])
            slot = (slot + 1) % slots
        return None


def empty_table() -> NgramTable:
    """A table without entries: blocks then come from matches in the text only, with their prior rates."""
    return NgramTable(
        1,
        np.zeros(1, dtype=np.uint16),
        np.zeros(1, dtype=np.uint32),
        np.zeros(1, dtype=np.uint8),
        LookupEvidence(prior_rates()),
    )


def context_key(context: Sequence[int]) -> int:
    """64-bit hash of a context's length and tokens, oldest token first."""
    key = len(context)
    for token in context:
        key = _mixed((key * WEYL + token + 1) & _MASK)
    return key


def context_keys(contexts: npt.NDArray[np.integer[Any]]) -> Words:
    """`context_key` of each row of [contexts, length]."""
    keys = np.full(len(contexts), contexts.shape[1], dtype=np.uint64)
    for column in contexts.T:
        keys = keys * np.uint64(WEYL) + column.astype(np.uint64) + np.uint64(1)
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(MIX_1)
        keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(MIX_2)
        keys ^= keys >> np.uint64(31)
    return keys


def levels_of(probabilities: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint8]:
    """Levels 0 to 255 at even steps of 1 - sqrt(1 - p): 0.99 and 0.999 differ by 17, 0.1 and 0.11 by 1."""
    depth = 1.0 - np.sqrt(1.0 - np.clip(probabilities, 0.0, 1.0))
    levels: npt.NDArray[np.uint8] = np.rint(depth * (LEVELS - 1)).astype(np.uint8)
    return levels


def build_slots(
    keys: Words, tokens: npt.NDArray[np.integer[Any]], levels: npt.NDArray[np.uint8], load: float = 0.8
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint32], npt.NDArray[np.uint8]]:
    """checks, tokens and levels [slots] of a table of these entries, filled to the share `load` < 1.

    If two contexts have the same check and probe the same slots, one hides the other.
    """
    slots = int(len(keys) / load) + 2
    wanted = ((keys >> np.uint64(32)) * np.uint64(slots) >> np.uint64(32)).astype(np.int64)
    place = np.full(slots, -1, dtype=np.int64)
    waiting = np.arange(len(keys))
    while len(waiting):
        # The first contender for an empty slot gets it; the others move on to the next slot.
        contenders = waiting[place[wanted[waiting]] < 0]
        _, firsts = np.unique(wanted[contenders], return_index=True)
        winners = contenders[firsts]
        place[wanted[winners]] = winners
        waiting = waiting[place[wanted[waiting]] != waiting]
        wanted[waiting] = (wanted[waiting] + 1) % slots
    taken = place >= 0
    checks = np.zeros(slots, dtype=np.uint16)
    slot_tokens = np.zeros(slots, dtype=np.uint32)
    slot_levels = np.zeros(slots, dtype=np.uint8)
    checks[taken] = np.maximum(keys[place[taken]].astype(np.uint16), np.uint16(1))
    slot_tokens[taken] = tokens[place[taken]]
    slot_levels[taken] = levels[place[taken]]
    return checks, slot_tokens, slot_levels


def _mixed(key: int) -> int:
    key = ((key ^ (key >> 30)) * MIX_1) & _MASK
    key = ((key ^ (key >> 27)) * MIX_2) & _MASK
    return key ^ (key >> 31)
