"""What planners are told of the sequences in a round."""

from __future__ import annotations

from collections.abc import Sequence

from dspark_core.algorithms.draft_policy import DraftCandidate
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.engine.drafting import draft_limit
from dspark_core.engine.sequence import SequenceState
from dspark_core.records import GenerateRequest, Verification

MAX_GROUP_TEMPERATURE = 2.0
"""Above, all sampling is taken to be alike: nearly at random."""


def draft_candidates(decoding: Sequence[SequenceState], block_size: int) -> list[DraftCandidate]:
    return [
        DraftCandidate(
            sequence_id=sequence.sequence_id,
            group=_group(sequence.request),
            draftable=sequence.request.speculation.enabled and draft_limit(sequence, block_size) > 0,
            floor_tokens_per_second=sequence.request.min_tokens_per_second,
            context_tokens=len(sequence.tokens),
        )
        for sequence in decoding
    ]


def plan_requests(
    decoding: Sequence[SequenceState], survival: Sequence[Sequence[float]]
) -> list[PlanRequest]:
    """`survival` in the order of the sequences."""
    return [
        PlanRequest(
            sequence_id=sequence.sequence_id,
            survival=row,
            floor_tokens_per_second=sequence.request.min_tokens_per_second,
            context_tokens=len(sequence.tokens),
            coupled=_may_look_ahead(sequence.request),
            granted=sequence.stats.verified_tokens / max(sequence.stats.rounds, 1),
        )
        for sequence, row in zip(decoding, survival, strict=True)
    ]


def _may_look_ahead(request: GenerateRequest) -> bool:
    """Where a draft token stands iff it is the target's own choice, no plan can bias the output."""
    return request.sampling.greedy or request.verification is Verification.COUPLED


def _group(request: GenerateRequest) -> str:
    """Requests sampled alike: acceptance depends on temperature more than on anything else known.

    Coarse, so that no client can make groups without end.
    """
    sampling = request.sampling
    temperature = min(sampling.temperature, MAX_GROUP_TEMPERATURE)
    return f"{request.verification.value}/{temperature:.1f}/{sampling.top_k > 0}/{sampling.top_p:.1f}"
