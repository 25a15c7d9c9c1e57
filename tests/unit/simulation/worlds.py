"""Small worlds whose behaviour can be worked out by hand."""

from __future__ import annotations

import numpy as np

from dspark_core.algorithms.round_time import DraftTimeModel, RoundTimeModel
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.engine.tracing.trace_format import TracedRequest, TracedRound
from dspark_core.simulation.domains import RecordedRequest, stack_domains
from dspark_core.simulation.running import World

STEP_SECONDS = 0.020
"""Of a step, however many tokens it holds."""
PERFECT = stack_domains({"only": (RecordedRequest(survival=((1.0,) * 4,) * 9, accepted=(4,) * 9),)})
"""Drafts of four tokens that are always accepted."""
FLAT = RoundTimeModel(StepTimeModel.of_curve((1, 1000), (STEP_SECONDS, STEP_SECONDS)))


def round_time(per_token: float = 0.001, draft: float = 0.004, base: float = STEP_SECONDS) -> RoundTimeModel:
    """Steps of base + per_token * tokens, drafts of `draft` however many are drafted for."""
    tokens = (1, 2, 8, 64, 512)
    return RoundTimeModel(
        StepTimeModel.of_curve(tokens, tuple(base + per_token * count for count in tokens)),
        DraftTimeModel((1, 64), (draft, draft)),
    )


def recorded(
    confidence: float = 0.7, *, requests: int = 6, rounds: int = 40, block: int = 4, seed: int = 0
) -> tuple[RecordedRequest, ...]:
    """Calibrated: each token stands with `confidence`, given those before it."""
    rng = np.random.default_rng(seed)
    survival = tuple(confidence**k for k in range(1, block + 1))
    found = []
    for _ in range(requests):
        stands = rng.random((rounds, block)) < confidence
        accepted = tuple(int(value) for value in np.cumprod(stands, axis=1).sum(axis=1))
        found.append(RecordedRequest(survival=(survival,) * rounds, accepted=accepted))
    return tuple(found)


def world(confidence: float = 0.7, times: RoundTimeModel | None = None) -> World:
    return World(stack_domains({"only": recorded(confidence)}), times or round_time())


def traced(number: int, *requests: TracedRequest, step: float = STEP_SECONDS) -> TracedRound:
    return TracedRound(
        at=float(number),
        round=number,
        planner="local",
        curve_version="c",
        batch_tokens=sum(1 + request.verified for request in requests),
        step_seconds=step,
        draft_seconds=0.004,
        requests=requests,
    )
