"""Outcomes of rounds of speculative decoding: as one record per round, and as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftRound:
    """One round of one request; `accepted <= verified <= drafted`."""

    drafted: int
    """Draft tokens available for verification."""
    verified: int
    accepted: int
    """Accepted draft tokens, up to and including a stop token."""
    committed: int
    """Tokens the round committed, the bonus token included."""
    stopped: bool = False
    """A stop token in the accepted prefix ended the round, so the draft tokens after it have no outcome."""
    survival: tuple[float, ...] = ()
    """Predicted a_1..a_drafted; empty without a confidence head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTable:
    """Rounds as columns; draft position k (from 1) is column k-1 of `survival`."""

    drafted: NDArray[np.int64]  # [rounds]
    verified: NDArray[np.int64]  # [rounds]
    accepted: NDArray[np.int64]  # [rounds]
    committed: NDArray[np.int64]  # [rounds]
    stopped: NDArray[np.bool_]  # [rounds]
    survival: NDArray[np.float64]  # [rounds, positions], NaN where there is no prediction

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
        """Length of the longest draft."""
        return int(self.survival.shape[1])

    @property
    def has_confidence(self) -> bool:
        return bool(np.isfinite(self.survival).any())

    def known(self, position: int) -> NDArray[np.bool_]:
        """[rounds]: whether it is known if draft tokens 1..position would all be accepted."""
        unseen = self.stopped & (self.accepted < position)
        return (self.verified >= position) & ~unseen

    def survived(self, position: int) -> NDArray[np.bool_]:
        """[rounds]: whether draft tokens 1..position were all accepted."""
        return self.accepted >= position
