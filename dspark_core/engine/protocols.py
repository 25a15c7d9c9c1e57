"""What the round loop needs of drafting and planning, and the records they exchange.

In-process engines and gRPC clients implement the same protocols and pass the same contract tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dspark_core.algorithms.draft_policy import DraftCandidate
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.records import DraftOrigin, RoundReport, SamplingParams, Verification


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftGeometry:
    """What a drafter serves. `fingerprint` ties it to the verifier's projection weights."""

    fingerprint: str
    block_size: int
    feature_size: int
    vocab_size: int
    context_window: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftItem:
    """One sequence to draft for.

    `features` holds positions [features_start, features_start + rows), all before the anchor. A
    start that does not continue what the drafter holds replaces its context (re-priming).
    """

    sequence_id: str
    anchor_token_id: int
    anchor_position: int
    features_start: int
    features: Tensor  # [rows, feature_size]
    token_ids: tuple[int, ...] = ()
    """The token at each feature position; only drafters that pair the two read it (Eagle3, MTP-1)."""
    sampling: SamplingParams
    """`seed` is always set when verification is coupled."""
    verification: Verification
    most_tokens: int | None = None
    """How much of a block is of use; a drafter may draft no more. None: all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseDistribution:
    """The proposal distribution of each block position: k entries that sum to one."""

    token_ids: Tensor  # [block, k] int64
    probabilities: Tensor  # [block, k] float32


@dataclass(frozen=True, slots=True)
class DraftBlock:
    """A proposal for one sequence; empty `token_ids` means plain decoding this round."""

    sequence_id: str
    token_ids: tuple[int, ...] = ()
    confidences: tuple[float, ...] = ()
    """Empty when the drafter has none (DFlash)."""
    distribution: SparseDistribution | None = None
    """Rejection mode at temperature > 0 only."""
    needs_context: bool = False
    """The drafter does not hold this sequence's context; send it again."""
    origin: DraftOrigin = DraftOrigin.DRAFTER


@dataclass(frozen=True, slots=True)
class DraftReply:
    """What became of a round's items."""

    blocks: Sequence[DraftBlock]
    """In the order of the items."""
    compute_seconds: float = 0.0
    """Of the drafter's own pass; 0: it did not tell."""
    drafter_id: str = ""


class DraftSource(Protocol):
    """Proposes draft blocks, for two rounds at a time at most: each is answered before the one after."""

    @property
    def geometry(self) -> DraftGeometry: ...

    @property
    def apart(self) -> bool:
        """Whether `propose` returns before the drafts are made, which others' work need not wait for."""
        ...

    @property
    def connected(self) -> bool:
        """Whether there is a drafter now. If not, nobody need read what `propose` takes: it would fail."""
        ...

    def propose(self, items: Sequence[DraftItem]) -> Future[DraftReply]:
        """Fails with `DraftUnavailableError`. Who gives up waiting leaves it as it is: the reply still tells
        what the drafter holds."""
        ...

    def release(self, sequence_ids: Sequence[str]) -> None:
        """Forgets ended sequences. Never fails, unknown ids are ignored."""
        ...

    @property
    def generation(self) -> int:
        """Changes whenever drafter state was lost, so that every sequence must be primed again."""
        ...


class PlanSource(Protocol):
    """Chooses for whom to draft and how much to verify. In each round: `wants_draft`, `plan`, `report`; where
    two cohorts take turns, a round is one cohort's, and its `wants_draft` follows its round before. Not in
    every round of requests that were all left without drafts (`DraftTurns`)."""

    def cohorts(self, candidates: Sequence[DraftCandidate], given: int | None) -> int:
        """Whether rounds are of everybody (1) or of one of two cohorts (2) until it is asked again, about
        every sixteen rounds. `given`: no choice, to be taken note of; None: what is faster."""
        ...

    def wants_draft(self, candidates: Sequence[DraftCandidate]) -> tuple[bool, ...]:
        """Whether each decoding request is drafted for this round; decided from earlier rounds only."""
        ...

    def plan(self, requests: Sequence[PlanRequest], capacity: int | None = None) -> tuple[int, ...]:
        """Verify length of each request. `capacity`: draft tokens to verify in all, when rounds that
        are over have decided so already; None: this source decides."""
        ...

    def report(self, report: RoundReport) -> None:
        """Tells how the round went; must not block."""
        ...
