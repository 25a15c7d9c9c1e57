"""The round loop's interfaces to drafting and planning, and the records they exchange.

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

    `features` holds positions [features_start, features_start + rows), all before the anchor. They are
    appended to the context the drafter holds, or replace it (re-priming) if they do not continue it.
    """

    sequence_id: str
    anchor_token_id: int
    anchor_position: int
    features_start: int
    features: Tensor  # [rows, feature_size]
    token_ids: tuple[int, ...] = ()
    """The token at each feature position; read only by drafters that pair tokens with features (Eagle3,
    MTP-1)."""
    sampling: SamplingParams
    """`seed` is always set when verification is coupled."""
    verification: Verification
    most_tokens: int | None = None
    """Draft tokens of use to the verifier; the drafter may stop there. None: the whole block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseDistribution:
    """The proposal distribution at each block position: k probabilities that sum to one."""

    token_ids: Tensor  # [block, k] int64
    probabilities: Tensor  # [block, k] float32


@dataclass(frozen=True, slots=True)
class DraftBlock:
    """A proposal for one sequence; empty `token_ids` means plain decoding this round."""

    sequence_id: str
    token_ids: tuple[int, ...] = ()
    confidences: tuple[float, ...] = ()
    """Empty if the drafter has no confidence head (DFlash)."""
    distribution: SparseDistribution | None = None
    """Only for rejection sampling at temperature > 0."""
    needs_context: bool = False
    """The drafter does not hold this sequence's context, which must be sent again."""
    origin: DraftOrigin = DraftOrigin.DRAFTER


@dataclass(frozen=True, slots=True)
class DraftReply:
    """The drafter's answer to one round's items."""

    blocks: Sequence[DraftBlock]
    """In the order of the items."""
    compute_seconds: float = 0.0
    """Duration of the drafter's own pass; 0 if unknown."""
    drafter_id: str = ""


class DraftSource(Protocol):
    """Proposes draft blocks. At most two rounds may be in flight; they are answered in order."""

    @property
    def geometry(self) -> DraftGeometry: ...

    @property
    def apart(self) -> bool:
        """Whether `propose` returns before the drafts are made, so that drafting overlaps other work."""
        ...

    @property
    def connected(self) -> bool:
        """Whether a drafter is connected. If not, `propose` would fail, so do not prepare its input."""
        ...

    def propose(self, items: Sequence[DraftItem]) -> Future[DraftReply]:
        """The future may fail with `DraftUnavailableError`. Do not cancel it when giving up: a late reply
        still tells what context the drafter holds."""
        ...

    def release(self, sequence_ids: Sequence[str]) -> None:
        """Forgets ended sequences. Never fails; ignores unknown ids."""
        ...

    @property
    def generation(self) -> int:
        """Changes whenever drafter state was lost; every sequence must then be primed again."""
        ...


class PlanSource(Protocol):
    """Chooses which requests to draft for and how much to verify.

    Called in each round in the order `wants_draft`, `plan`, `report`. Where two cohorts take turns, a round
    belongs to one of them, and its `wants_draft` is called right after its previous round. `DraftTurns` may
    skip `wants_draft` while it left all requests without drafts.
    """

    def cohorts(self, candidates: Sequence[DraftCandidate], given: int | None) -> int:
        """Whether rounds include all requests (1) or one of two cohorts (2) until the next call, about
        sixteen rounds later. `given`: the choice is already made and only noted; None: choose the faster."""
        ...

    def wants_draft(self, candidates: Sequence[DraftCandidate]) -> tuple[bool, ...]:
        """Whether to draft for each decoding request in this round; decided from earlier rounds only."""
        ...

    def plan(self, requests: Sequence[PlanRequest], capacity: int | None = None) -> tuple[int, ...]:
        """Verify length of each request. `capacity`: total draft tokens to verify, if already determined by
        completed rounds; None: this source decides."""
        ...

    def report(self, report: RoundReport) -> None:
        """Reports a completed round; must not block."""
        ...
