"""Local planning: applies the pure planners to this engine's times, which live rounds keep refining."""

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
"""Without a profile, only the first tokens are verified, and only if likely to be accepted: on most hardware
the second and third token of a request cost less than this, but that is not certain on any."""

EAGER_ROUNDS, PLANNED_ROUNDS_PER_LESSON = 128, 6
"""After EAGER_ROUNDS rounds with drafts, times are learned from only one such round in
PLANNED_ROUNDS_PER_LESSON: learning took 2 % of a single-request round."""
LESSON_SECONDS = 0.02
"""No round is skipped once the steps since the last lesson took this long: a machine that slowed down has few
rounds per second."""
PLAIN_ROUNDS_PER_LESSON = 4
"""Times are learned from one in this many rounds without drafts: these are alike, and learning from each
would noticeably slow a small model."""

MAX_PROBES, ROUNDS_BETWEEN_PROBES = 4, 64
"""After a change of the machine's speed at most MAX_PROBES rounds verify nothing, and no more until
ROUNDS_BETWEEN_PROBES rounds later: where speed changes constantly, probing finds out nothing."""

MIN_GAIN = 0.03
"""Least gain in tokens per second that a plan must promise over verifying nothing. The tokens that seem best
are so partly by luck, and a gain of a few percent is within the model's error."""


class LocalPlanSource:
    """A `PlanSource` that needs no scheduler."""

    def __init__(self, round_time: RoundTimeModel | None) -> None:
        """`round_time` None: without a profile plans are conservative, see above."""
        self._round_time = round_time
        self._policy = DraftPolicy()
        self._beside_seconds: float | None = None  # the other cohort's pass; None: no cohorts
        self._plain_rounds = 0
        self._planned_rounds = 0
        self._untaught_seconds = 0.0
        self._probing_since = -ROUNDS_BETWEEN_PROBES
        self.paused_requests = 0
        """Requests that were draftable but not drafted for in the newest round."""
        self.draft_price = 0.0
        """What a second of the drafter's time is worth to other verifiers that share it, in tokens."""

    @property
    def round_time(self) -> RoundTimeModel | None:
        """The current model of this engine's speed; None if unknown."""
        return self._round_time

    def adopt(self, round_time: RoundTimeModel) -> bool:
        """Takes over step times of another replica if this engine has none; returns whether it did."""
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
            return (0,) * len(requests)  # no drafts, nothing to plan
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
        """Whether to verify nothing this round: steps became slower or faster, and only a step without draft
        tokens can show whether all steps did. Depends on completed rounds only, so it causes no bias."""
        if self._round_time is None or not self._round_time.verify.history.ambiguous:
            return False
        rounds = self._planned_rounds - self._probing_since
        if MAX_PROBES <= rounds < ROUNDS_BETWEEN_PROBES or any(r.floor_tokens_per_second for r in requests):
            return False
        if rounds >= ROUNDS_BETWEEN_PROBES:
            self._probing_since = self._planned_rounds
        return True

    def _times(self, round_time: RoundTimeModel) -> RoundTimeModel:
        """`round_time` for the current kind of rounds: those of all requests or of one cohort."""
        if self._beside_seconds is None:
            return round_time
        return replace(round_time, beside_seconds=self._beside_seconds)

    def report(self, report: RoundReport) -> None:
        """Learns what steps and drafts cost and what drafts gain; using it in later rounds causes no bias."""
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
        # Priming makes a draft slow once, or every time if looked-up tokens come between drafts. Late drafts
        # teach nothing: `Drafting` backs off from a slow drafter and notices when it is fast again, which
        # times learned from the deadline would conceal for long.
        typical = not report.drafter_primed or self._policy.steady(report.requests)
        self._round_time = self._round_time.learned(report, typical=typical)


_Floored = TypeVar("_Floored", DraftCandidate, PlanRequest)


def _in_turns(requests: Sequence[_Floored]) -> list[_Floored]:
    """Raises the floors: with cohorts, a request takes part in only one of COHORTS rounds."""
    return [
        one
        if one.floor_tokens_per_second is None
        else replace(one, floor_tokens_per_second=COHORTS * one.floor_tokens_per_second)
        for one in requests
    ]


def _may_be_dropped(requests: Sequence[PlanRequest]) -> bool:
    """Whether the whole plan may be discarded for lack of gain. That decision looks at all tokens, which is
    allowed only for requests whose tokens are accepted iff they equal the target's choice (the causal
    barrier), and plans that serve a speed floor are kept in any case."""
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
    """Verifies every draft token: static speculation, the baseline against which scheduling is measured."""

    def cohorts(self, candidates: Sequence[DraftCandidate], given: int | None) -> int:
        return given or 1

    def wants_draft(self, candidates: Sequence[DraftCandidate]) -> tuple[bool, ...]:
        return tuple(candidate.draftable for candidate in candidates)

    def plan(self, requests: Sequence[PlanRequest], capacity: int | None = None) -> tuple[int, ...]:
        if capacity is None:
            return tuple(len(request.survival) for request in requests)
        batch = PlanBatch.of(requests)
        any_time = np.ones(1 + batch.survival.size)  # so that only the order of tokens decides
        return tuple(spend(batch, capacity, any_time).tolist())

    def report(self, report: RoundReport) -> None:
        """A static plan learns nothing."""


def conservative_lengths(requests: Sequence[PlanRequest]) -> tuple[int, ...]:
    """Verify lengths for an engine of unknown speed. Lossless: each token's own survival decides."""
    most = UNPROFILED_MAX_LENGTH
    return tuple(
        len(list(takewhile(lambda value: value >= UNPROFILED_MIN_SURVIVAL, request.survival[:most])))
        for request in requests
    )
