"""What happened in rounds of speculative decoding: one record per round, and all as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftRound:
    """One round of one request; `accepted <= verified <= drafted`."""

    drafted: int
    """Draft tokens that could have been verified."""
    verified: int
    accepted: int
    """Verified tokens that stood, up to a stop token."""
    committed: int
    """Tokens the round added, the bonus token included."""
    stopped: bool = False
    """A stop token inside the accepted prefix ended the round: what follows it was never put to the test."""
    survival: tuple[float, ...] = ()
    """Predicted a_1..a_drafted; empty without a confidence head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTable:
    """Rounds as columns. Draft position k (from 1) is column k-1 of the two-dimensional ones."""

    drafted: NDArray[np.int64]  # [rounds]
    verified: NDArray[np.int64]  # [rounds]
    accepted: NDArray[np.int64]  # [rounds]
    committed: NDArray[np.int64]  # [rounds]
    stopped: NDArray[np.bool_]  # [rounds]
    survival: NDArray[np.float64]  # [rounds, positions], NaN where nothing was predicted

    @classmethod
    def from_rounds(cls, rounds: Sequence[DraftRound]) -> RoundTable:
        width = max((one.drafted for one in rounds), default=0)
        survival = np.full((len(rounds), width), np.nan)
        for row, one in enumerate(rounds):
            survival[row, : len(one.survival)] = one.survival
        return cls(
            drafted=np.array([one.drafted for one in rounds], dtype=np.int64),
            verified=np.array([one.verified for one in rounds], dtype=np.int64),
            accepted=np.array([one.accepted for one in rounds], dtype=np.int64),
            committed=np.array([one.committed for one in rounds], dtype=np.int64),
            stopped=np.array([one.stopped for one in rounds], dtype=np.bool_),
            survival=survival,
        )

    @property
    def rounds(self) -> int:
        return len(self.drafted)

    @property
    def positions(self) -> int:
        """The longest draft."""
        return int(self.survival.shape[1])

    @property
    def has_confidence(self) -> bool:
        return bool(np.isfinite(self.survival).any())

    def known(self, position: int) -> NDArray[np.bool_]:
        """[rounds]: it is known whether draft tokens 1..position all stood."""
        unseen = self.stopped & (self.accepted < position)
        return (self.verified >= position) & ~unseen

    def survived(self, position: int) -> NDArray[np.bool_]:
        """[rounds]: draft tokens 1..position all stood."""
        return self.accepted >= position
