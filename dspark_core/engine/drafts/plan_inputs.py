"""Describes a round's sequences to the planners."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dspark_core.algorithms.draft_policy import DraftCandidate
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.prefix_scheduler import survival_from_confidence
from dspark_core.engine.drafts.drafting import draft_limit
from dspark_core.engine.protocols import DraftBlock
from dspark_core.engine.sequence import SequenceState
from dspark_core.records import DraftOrigin, GenerateRequest, Verification

MAX_GROUP_TEMPERATURE = 2.0
"""Temperatures above are grouped with this one: sampling is then nearly random."""


def speed_floors(decoding: Sequence[SequenceState]) -> list[float | None]:
    """Those that a round of these sequences plans for. Wishes count only where nothing was promised: a client
    may wish for anything, which must not break a promise."""
    floors = [s.request.min_tokens_per_second for s in decoding]
    if not any(floors):  # the usual case, three times a round
        return floors
    promised = [s.request.floor_promised for s in decoding]
    if not any(promised):
        return floors
    return [floor if held else None for floor, held in zip(floors, promised, strict=True)]


def draft_candidates(
    decoding: Sequence[SequenceState], block_size: int, lookups: Mapping[str, DraftBlock]
) -> list[DraftCandidate]:
    """`lookups`: looked-up blocks by sequence id."""
    return [
        DraftCandidate(
            sequence_id=sequence.sequence_id,
            group=sampling_group(sequence.request),
            draftable=sequence.request.speculation.enabled and draft_limit(sequence, block_size) > 0,
            floor_tokens_per_second=floor,
            context_tokens=len(sequence.tokens),
            lookup_survival=_survival_of(lookups.get(sequence.sequence_id)),
        )
        for sequence, floor in zip(decoding, speed_floors(decoding), strict=True)
    ]


def _survival_of(block: DraftBlock | None) -> tuple[float, ...]:
    return () if block is None else survival_from_confidence(block.confidences)


def plan_requests(
    decoding: Sequence[SequenceState],
    survival: Sequence[Sequence[float]],
    origins: Sequence[DraftOrigin],
) -> list[PlanRequest]:
    """`survival` and `origins` in the order of the sequences."""
    return [
        PlanRequest(
            sequence_id=sequence.sequence_id,
            survival=row,
            floor_tokens_per_second=floor,
            context_tokens=len(sequence.tokens),
            coupled=origin is DraftOrigin.LOOKUP or may_look_ahead(sequence.request),
            origin=origin,
            temperature=sequence.request.sampling.temperature,
            granted=sequence.stats.verified_tokens / max(sequence.stats.rounds, 1),
        )
        for sequence, row, origin, floor in zip(
            decoding, survival, origins, speed_floors(decoding), strict=True
        )
    ]


def may_look_ahead(request: GenerateRequest) -> bool:
    """Whether planning may use tokens not yet decided on: where a draft token is accepted iff it is the
    target's own choice, no plan can bias the output. (Nor where the block was looked up: it was fixed
    before.)
    """
    return request.sampling.greedy or request.verification is Verification.COUPLED


def sampling_group(request: GenerateRequest) -> str:
    """Key of requests sampled alike, by temperature above all, on which acceptance depends the most.

    Coarse, so that clients cannot create an unbounded number of groups.
    """
    sampling = request.sampling
    temperature = min(sampling.temperature, MAX_GROUP_TEMPERATURE)
    return f"{request.verification.value}/{temperature:.1f}/{sampling.top_k > 0}/{sampling.top_p:.1f}"
