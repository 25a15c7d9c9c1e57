"""Local planning: the pure planners over the times this engine measured and keeps learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TypeVar

import numpy as np

from dspark_core.algorithms.cohorts import COHORTS, worth_turns
from dspark_core.algorithms.delayed_scheduler import spend
from dspark_core.algorithms.draft_policy import DraftCandidate, DraftPolicy
from dspark_core.algorithms.plan_batch import PlanBatch
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.planner import plan_lengths
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.records import DraftOrigin, RoundReport

UNPROFILED_MAX_LENGTH = 2
UNPROFILED_MIN_SURVIVAL = 0.6
"""Without a profile a token is verified if it is likely to stand, and never more than a few: on most
hardware the second and third token of a request cost less than this, on no hardware is it certain."""

EAGER_ROUNDS, PLANNED_ROUNDS_PER_LESSON = 128, 6
"""After so many rounds with drafts times are learned from one in so many: it took 2 % of a round of one."""
LESSON_SECONDS = 0.02
"""Nor is it where rounds take this long together: a machine that slows down has few of them a second."""
PLAIN_ROUNDS_PER_LESSON = 4
"""Rounds without drafts are alike and plan nothing: times are learned from one in so many of them, as
learning from each would cost a small model's round a share that is felt."""

MAX_PROBES, ROUNDS_BETWEEN_PROBES = 4, 64
"""Rounds that verify nothing after a change of the machine's speed, and until there may be such again: where
speed changes all the time there is nothing to be found out."""

MIN_GAIN = 0.03
"""What a plan has to promise over verifying nothing. The tokens that seem best are so partly by luck, and a
plan for a few percent is lost in what it overlooks."""


class LocalPlanSource:
    """`PlanSource` with no one to ask."""

    def __init__(self, round_time: RoundTimeModel | None) -> None:
        """`round_time`: None while nothing was profiled; plans are then conservative, see above."""
        self._round_time = round_time
        self._policy = DraftPolicy()
        self._beside_seconds: float | None = None  # of the other cohort's pass; None: there are none
        self._plain_rounds = 0
        self._planned_rounds = 0
        self._untaught_seconds = 0.0
        self._probing_since = -ROUNDS_BETWEEN_PROBES
        self.paused_requests = 0
        """Requests that were draftable in the newest round and not drafted for."""
        self.draft_price = 0.0
        """Tokens that a second of the drafter's time is worth to others who share it."""

    @property
    def round_time(self) -> RoundTimeModel | None:
        """What is known of this engine's speed now."""
        return self._round_time

    def adopt(self, round_time: RoundTimeModel) -> bool:
        """Step times from elsewhere, for an engine that has none -> whether it had none."""
        if self._round_time is not None:
            return False
        self._round_time = round_time
        return True

    def cohorts(self, candidates: Sequence[DraftCandidate], given: int | None) -> int:
        self._beside_seconds = None
        if given == 1 or self._round_time is None:
            return given or 1
        gains, verified = self._policy.prospects(candidates)
        context = sum(candidate.context_tokens for candidate in candidates)
        self._beside_seconds = worth_turns(gains, verified, self._round_time, context, self.draft_price)
        if self._beside_seconds is None and given is not None:
            count, tokens = len(gains) / given, (len(gains) + float(verified.sum())) / given
            self._beside_seconds = self._round_time.seconds(round(count), tokens, context // given)
        return 1 if self._beside_seconds is None else COHORTS

    def wants_draft(self, candidates: Sequence[DraftCandidate]) -> tuple[bool, ...]:
        if self._round_time is None:
            return tuple(candidate.draftable and not candidate.lookup_survival for candidate in candidates)
        if self._beside_seconds is not None:
            candidates = _in_turns(candidates)
        wanted = self._policy.choose(candidates, self._times(self._round_time), self.draft_price)
        self.paused_requests = sum(candidate.draftable for candidate in candidates) - sum(wanted)
        return wanted

    def plan(self, requests: Sequence[PlanRequest], capacity: int | None = None) -> tuple[int, ...]:
        if self._round_time is None:
            return conservative_lengths(requests)
        if not any(request.survival for request in requests):
            return (0,) * len(requests)  # nobody was drafted for, so there is nothing to plan
        if self._probes_machine(requests):
            return (0,) * len(requests)
        times = self._times(self._round_time)
        if self._beside_seconds is not None:
            requests = _in_turns(requests)
        lengths = plan_lengths(requests, times, capacity=capacity)
        if _may_be_dropped(requests) and not _gains_enough(requests, lengths, times):
            return (0,) * len(requests)
        return lengths

    def _probes_machine(self, requests: Sequence[PlanRequest]) -> bool:
        """Whether to verify nothing for once: steps became slower or faster, and only one without draft
        tokens tells whether all of them did. By rounds that are over, so it biases nothing."""
        if self._round_time is None or not self._round_time.verify.history.ambiguous:
            return False
        rounds = self._planned_rounds - self._probing_since
        if MAX_PROBES <= rounds < ROUNDS_BETWEEN_PROBES or any(r.floor_tokens_per_second for r in requests):
            return False
        if rounds >= ROUNDS_BETWEEN_PROBES:
            self._probing_since = self._planned_rounds
        return True

    def _times(self, round_time: RoundTimeModel) -> RoundTimeModel:
        """Of the rounds there are: of everybody, or of a cohort."""
        if self._beside_seconds is None:
            return round_time
        return replace(round_time, beside_seconds=self._beside_seconds)

    def report(self, report: RoundReport) -> None:
        """Learns what steps and drafts cost and what drafts bring; earlier rounds bias nothing."""
        self._policy.learn(report.requests)
        if self._round_time is None or not report.requests:
            return
        planned = any(request.survival for request in report.requests)
        self._plain_rounds = 0 if planned else self._plain_rounds + 1
        self._planned_rounds += planned
        late = self._planned_rounds > EAGER_ROUNDS and self._planned_rounds % PLANNED_ROUNDS_PER_LESSON
        self._untaught_seconds += report.step_seconds
        skipped = late if planned else self._plain_rounds % PLAIN_ROUNDS_PER_LESSON
        if skipped and self._untaught_seconds < LESSON_SECONDS:
            return
        self._untaught_seconds = 0.0
        if report.loop_seconds > 0:
            self._round_time = self._round_time.observed_loop(len(report.requests), report.loop_seconds)
        drafted = sum(request.drafted for request in report.requests)
        # A drafter that catches up is slow once, or every time where looked-up tokens come between drafts.
        # Drafts that came late teach nothing: `Drafting` leaves such a drafter alone and finds out when it is
        # faster, which times learned from the deadline would hide for long.
        typical = not report.drafter_primed or self._policy.steady(report.requests)
        if drafted and report.draft_seconds > 0 and typical:
            # Told apart, waiting behind others is not taken for a slow drafter.
            self._round_time = self._round_time.observed_draft(
                drafted, report.draft_seconds, report.draft_compute_seconds or None
            )
        # A prompt's chunk in the step makes it another kind of step.
        decoded = sum(1 + request.verify_length for request in report.requests)
        if report.step_seconds > 0 and report.batch_tokens == decoded:
            self._round_time = self._round_time.observed_step(
                len(report.requests), decoded, report.context_tokens, report.step_seconds
            )


_Floored = TypeVar("_Floored", DraftCandidate, PlanRequest)


def _in_turns(requests: Sequence[_Floored]) -> list[_Floored]:
    """As much as floors ask of one round in so many."""
    return [
        one
        if one.floor_tokens_per_second is None
        else replace(one, floor_tokens_per_second=COHORTS * one.floor_tokens_per_second)
        for one in requests
    ]


def _may_be_dropped(requests: Sequence[PlanRequest]) -> bool:
    """A whole plan is judged by all its tokens, which only those may look at that stand iff they equal the
    target's choice (the causal barrier); and what holds a floor is not weighed."""
    return all(request.coupled and not request.floor_tokens_per_second for request in requests)


def _gains_enough(
    requests: Sequence[PlanRequest], lengths: Sequence[int], round_time: RoundTimeModel
) -> bool:
    count, verified = len(requests), sum(lengths)
    if not verified:
        return True
    origins = [request.origin for request in requests if request.survival]
    drafted = origins.count(DraftOrigin.DRAFTER)
    context = sum(request.context_tokens for request in requests)
    pairs = zip(requests, lengths, strict=True)
    expected = count + sum(sum(request.survival[:length]) for request, length in pairs)
    plain_rate = count / round_time.seconds(count, count, context, drafted)
    rate = expected / round_time.seconds(count, count + verified, context, drafted)
    return rate >= (1.0 + MIN_GAIN) * plain_rate


class FullPlanSource:
    """Verifies every draft token: static speculation, the baseline scheduling is measured against."""

    def cohorts(self, candidates: Sequence[DraftCandidate], given: int | None) -> int:
        return given or 1

    def wants_draft(self, candidates: Sequence[DraftCandidate]) -> tuple[bool, ...]:
        return tuple(candidate.draftable for candidate in candidates)

    def plan(self, requests: Sequence[PlanRequest], capacity: int | None = None) -> tuple[int, ...]:
        if capacity is None:
            return tuple(len(request.survival) for request in requests)
        batch = PlanBatch.of(requests)
        any_time = np.ones(1 + batch.survival.size)  # ranks alone decide
        return tuple(spend(batch, capacity, any_time).tolist())

    def report(self, report: RoundReport) -> None:
        """A static plan learns nothing."""


def conservative_lengths(requests: Sequence[PlanRequest]) -> tuple[int, ...]:
    """For engines whose speed nobody measured. A token's own survival decides on it: lossless."""
    most = UNPROFILED_MAX_LENGTH
    return tuple(
        len(list(takewhile(lambda value: value >= UNPROFILED_MIN_SURVIVAL, request.survival[:most])))
        for request in requests
    )
