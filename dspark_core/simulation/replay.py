"""Replans recorded rounds with other planners and estimates the result.

Round by round, the planner gets the recorded survival of every request and the measured round times (scaled
to what the recorded round actually took), and returns verify lengths. Committed tokens are counted twice:
as predicted by survival, and by recorded outcomes. An outcome is known if the recorded round verified at
least as far or rejected an earlier token; otherwise survival fills in the rest. Not captured: with other
lengths, the following rounds would have started at other anchors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dspark_core.algorithms.plan_batch import Bools, Ints, PlanBatch, survival_matrix
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.algorithms.speed_floor import expected_tokens, unmet_floors
from dspark_core.algorithms.step_surface import Floats
from dspark_core.engine.tracing.trace_format import TracedRequest, TracedRound
from dspark_core.simulation.planner_names import planner_factory
from dspark_core.simulation.planners import RoundOutcome, RoundPlanner, RoundView

RECORDED = "recorded"
MAX_SLOWDOWN = 3.0
"""Limit on the ratio of recorded to modelled step time; anything beyond counts as a stall."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayResult:
    planner: str
    rounds: int
    request_rounds: int
    verified: int
    """Draft tokens verified."""
    verify_length: float
    """Draft tokens verified per request and round."""
    expected_tokens: float
    """Committed tokens, as predicted by survival."""
    outcome_tokens: float
    """Committed tokens, by recorded outcomes where known."""
    undrafted_share: float
    """Share of request rounds recorded without a draft, where no planner could verify anything."""
    known_share: float
    """Share of request rounds whose outcome under this planner is known."""
    seconds: float
    expected_tokens_per_second: float
    outcome_tokens_per_second: float
    unmet_floors: int
    """Request rounds whose floor the plan misses, as predicted by survival."""
    same_share: float
    """Share of request rounds planned as recorded."""


@dataclass(slots=True)
class _Sums:
    rounds: int = 0
    request_rounds: int = 0
    verified: int = 0
    expected: float = 0.0
    outcome: float = 0.0
    undrafted: int = 0
    known: int = 0
    seconds: float = 0.0
    unmet: int = 0
    same: int = 0
    ids: dict[str, int] = field(default_factory=dict)


def replay(
    rounds: Sequence[TracedRound],
    round_time: RoundTimeModel,
    planner: str,
    on_round: Callable[[], None] = lambda: None,
) -> ReplayResult:
    """Replay the rounds of one verifier in order. `planner`: a name, or RECORDED for the recorded lengths.

    Raises ConfigError for an unknown planner.
    """
    chosen = None if planner == RECORDED else planner_factory(planner)(round_time)
    sums = _Sums()
    for one in rounds:
        _replay_round(one, round_time, chosen, sums)
        on_round()
    requests = max(sums.request_rounds, 1)
    return ReplayResult(
        planner=planner,
        rounds=sums.rounds,
        request_rounds=sums.request_rounds,
        verified=sums.verified,
        verify_length=sums.verified / requests,
        expected_tokens=sums.expected,
        outcome_tokens=sums.outcome,
        undrafted_share=sums.undrafted / requests,
        known_share=sums.known / requests,
        seconds=sums.seconds,
        expected_tokens_per_second=sums.expected / max(sums.seconds, 1e-12),
        outcome_tokens_per_second=sums.outcome / max(sums.seconds, 1e-12),
        unmet_floors=sums.unmet,
        same_share=sums.same / requests,
    )


def _replay_round(
    one: TracedRound, round_time: RoundTimeModel, planner: RoundPlanner | None, sums: _Sums
) -> None:
    requests = one.requests
    recorded = np.array([request.verified for request in requests], dtype=np.int64)
    batch = _batch(one, planner, sums.ids)
    # Prefill tokens share the pass and so shift the drafts along the step-time curve.
    count, base = len(requests), one.prefill_tokens
    table = round_time.verify.table(
        count, np.arange(count + base, count + base + batch.survival.size + 1), one.context_tokens
    )
    slowdown = one.step_seconds / float(table[min(int(recorded.sum()), len(table) - 1)])
    drafted = int((batch.survival[:, :1] >= 0.0).sum()) - batch.looked_up
    # A planner that drafts pays the recorded draft time, one that does not pays none. All pay the loop time,
    # which is not recorded for the first round after an idle period.
    wait = one.draft_seconds if drafted else 0.0
    loop = one.loop_seconds or round_time.loop.seconds(count)
    steps = table * min(max(slowdown, 1.0 / MAX_SLOWDOWN), MAX_SLOWDOWN)
    lengths = recorded if planner is None else planner.plan(batch, steps + (wait + loop))
    accepted, known = _outcomes(requests, lengths)
    verified = int(lengths.sum())
    seconds = float(steps[verified]) + wait + loop
    if planner is not None:
        planner.learn(
            RoundOutcome(
                lengths,
                accepted.astype(np.int64),
                count + verified + base,
                one.context_tokens,
                wait,
                float(steps[verified]),
                loop,
            )
        )
    sums.rounds += 1
    sums.request_rounds += count
    sums.verified += verified
    sums.expected += float(expected_tokens(batch, lengths).sum())
    sums.outcome += count + float(accepted.sum())
    sums.undrafted += sum(not request.survival for request in requests)
    sums.known += int(known.sum())
    sums.seconds += seconds
    sums.unmet += len(unmet_floors(batch, lengths, seconds))
    sums.same += int((lengths == recorded).sum())


def _batch(one: TracedRound, planner: RoundPlanner | None, known: dict[str, int]) -> PlanBatch:
    requests, count = one.requests, len(one.requests)
    survival = survival_matrix([request.survival for request in requests])
    floors = np.array([request.min_tokens_per_second for request in requests])
    context = np.full(count, one.context_tokens // max(count, 1), dtype=np.int64)
    looked_up = np.array([request.looked_up for request in requests], dtype=np.bool_)
    if planner is not None:
        draftable: Bools = np.any(survival >= 0.0, axis=1) & ~looked_up
        ids = np.array([known.setdefault(request.sequence_id, len(known)) for request in requests])
        chosen = planner.drafted(RoundView(ids, context, floors, draftable))
        if chosen is not None:
            survival[~chosen & ~looked_up] = -1.0
    return PlanBatch(
        survival=survival,
        floors=floors,
        granted=np.zeros(count, dtype=np.int64),
        coupled=np.array([request.coupled for request in requests], dtype=np.bool_),
        context_tokens=one.context_tokens,
        looked_up=int((looked_up & np.any(survival >= 0.0, axis=1)).sum()),
    )


def _outcomes(requests: Sequence[TracedRequest], lengths: Ints) -> tuple[Floats, Bools]:
    """Accepted draft tokens at these lengths [requests] float, and whether they are known [requests]."""
    accepted = np.zeros(len(requests))
    known = np.ones(len(requests), dtype=np.bool_)
    for index, (request, length) in enumerate(zip(requests, lengths.tolist(), strict=True)):
        accepted[index] = min(request.accepted, length)
        if length > request.verified and request.accepted == request.verified:
            known[index] = False
            reached = request.survival[request.verified - 1] if request.verified else 1.0
            more = sum(request.survival[request.verified : length])
            accepted[index] += more / reached if reached > 0 else 0.0
    return accepted, known
