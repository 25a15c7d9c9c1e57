"""A verifier's speed as its rounds show it: round time at any load, and tokens per request and round."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from dspark_core.algorithms.cohorts import COHORTS, cycle_seconds
from dspark_core.algorithms.round_time import RoundTimeModel, decoding_step
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.errors import ConfigError, InvalidRequestError
from dspark_core.records import RoundReport, StepTime

_log = logging.getLogger(__name__)

SMOOTHING = 0.1
"""Weight of the newest round in running means."""
FORGET_SECONDS = 5.0
"""Time constant with which an idle verifier's slowdown is forgotten."""
PREFILL_TOKENS = 256
"""Prefill time is estimated in passes of this size."""
_MOST_ESTIMATES = 1024
"""Kept of each kind between two rounds."""


class VerifierPace:
    """Starts without a curve and learns from `adopt`, `start_from` and `observe`.

    Estimates are kept until it learns more: every request is routed by those of every verifier. A curve that
    gives no positive ones is dropped, as that of one verifier must not fail the comparison of all.
    """

    def __init__(self, replica_id: str = "") -> None:
        self.model: RoundTimeModel | None = None
        self._replica_id = replica_id
        self._told = False
        self._profile: tuple[StepTime, ...] = ()
        self._tokens_per_request = 1.0
        self._accepted_length = 1.0
        self._context_per_request = 0.0
        self._drafted_share = 0.0
        self._in_turns = False
        self._round_seconds: dict[int, float] = {}
        self._plain_seconds: dict[int, float] = {}
        """Estimates by number of requests, with and without drafts."""
        self._prefill_seconds: dict[int, float] = {}
        """Estimates of one pass by its tokens."""

    def adopt(self, profile: tuple[StepTime, ...], *, begins: bool = False) -> None:
        """Starts over from a measured profile. A repeated one is ignored, since what was learned on top of it
        is better. `begins`: this is a stream's first report, which carries the whole profile. Raises
        InvalidRequestError for points that do not belong together."""
        if begins and not profile:
            self._profile = ()  # another verifier, without a profile, may have taken the address
        if not profile or profile == self._profile:
            return
        try:
            self.model = RoundTimeModel(StepTimeModel.of_step_times(profile))
            self.forget_estimates()
        except ConfigError as error:
            raise InvalidRequestError(f"profile: {error}", field="profile") from None
        self._profile = profile

    @property
    def profiled(self) -> bool:
        """Whether the verifier measured its step times itself."""
        return bool(self._profile)

    @property
    def measured(self) -> bool:
        """Whether the curve stems from a profile, its own or its kind's, not just from its own rounds."""
        return self.model is not None and not self.model.verify.learned

    def start_from(self, model: StepTimeModel) -> None:
        """Gives a verifier without a profile the curve of its kind."""
        self.model = RoundTimeModel(model)
        self.forget_estimates()

    def observe(self, report: RoundReport) -> None:
        self.forget_estimates()
        if self.model is not None:
            self.model = self.model.learned(report, typical=not report.drafter_primed)
        elif (step := decoding_step(report)) is not None:
            self.model = RoundTimeModel(StepTimeModel.learn(*step))
        if report.requests:
            self._in_turns = report.cohorts > 1
            count = len(report.requests)
            verified = sum(request.verify_length for request in report.requests)
            accepted = sum(request.accepted for request in report.requests)
            self._tokens_per_request += SMOOTHING * (1.0 + verified / count - self._tokens_per_request)
            self._accepted_length += SMOOTHING * (1.0 + accepted / count - self._accepted_length)
            self._context_per_request += SMOOTHING * (
                report.context_tokens / count - self._context_per_request
            )
            drafted = sum(request.drafted for request in report.requests)
            self._drafted_share += SMOOTHING * (drafted / count - self._drafted_share)

    @property
    def accepted_length(self) -> float:
        """Tokens a request gains per round, bonus token included."""
        return self._accepted_length

    def round_seconds(self, requests: int) -> float | None:
        """Time until `requests` requests like those seen have each had a round; None without a curve."""
        return self._kept(self._round_seconds, requests, lambda model: self._estimated(model, requests))

    def plain_seconds(self, requests: int) -> float | None:
        """Round time of `requests` requests without drafts; None without a curve.

        For comparing verifiers: drafts make rounds longer and gain more tokens than that costs, so rounds as
        they are would show a verifier that drafts as a slow one.
        """

        def estimated(model: RoundTimeModel) -> float:
            return model.seconds(requests, requests, round(requests * self._context_per_request))

        return self._kept(self._plain_seconds, requests, estimated)

    def _estimated(self, model: RoundTimeModel, requests: int) -> float:
        of_all = (
            requests,
            max(requests, round(requests * self._tokens_per_request)),
            round(requests * self._context_per_request),
            round(requests * self._drafted_share),
        )
        in_turns = self._in_turns and requests >= COHORTS
        return cycle_seconds(model, *of_all) if in_turns else model.seconds(*of_all)

    def _kept(
        self, estimates: dict[int, float], key: int, estimate: Callable[[RoundTimeModel], float]
    ) -> float | None:
        """The estimate under `key`, made if there is none. None without a curve, or with one that gives no
        positive number; such a curve is dropped."""
        if self.model is None:
            return None
        if (known := estimates.get(key)) is not None:
            return known
        try:
            seconds = estimate(self.model)
            problem = f"{seconds} s" if not (math.isfinite(seconds) and seconds > 0.0) else ""
        except Exception as error:
            seconds, problem = math.nan, f"{type(error).__name__}: {error}"
        if problem:
            self._drop_curve(problem)
            return None
        if len(estimates) >= _MOST_ESTIMATES:
            estimates.clear()
        estimates[key] = seconds
        return seconds

    def _drop_curve(self, problem: str) -> None:
        self.model, self._profile = None, ()
        self.forget_estimates()
        if not self._told:
            self._told = True
            _log.warning("dropping the step times of verifier %s, they give %s", self._replica_id, problem)

    def relaxation(self, idle_seconds: float) -> float:
        """Factor, at most 1, for round times last observed `idle_seconds` ago.

        It forgets a slowdown, because a verifier without requests cannot show that the slowdown is over.
        """
        if self.model is None or self.model.verify.scale <= 1.0:
            return 1.0
        return float(self.model.verify.scale ** (math.exp(-idle_seconds / FORGET_SECONDS) - 1.0))

    def tokens_per_second(self, requests: int) -> float | None:
        """Per request, with `requests` running; None without a curve."""
        seconds = self.round_seconds(requests)
        return None if seconds is None else self._accepted_length / seconds

    def undisturbed_tokens_per_second(self) -> float | None:
        """Of a lone request while nothing slows the verifier down; None without a curve."""
        alone = self.tokens_per_second(1)
        return None if alone is None else alone / self.relaxation(math.inf)

    def prefill_seconds(self, tokens: int) -> float:
        """For `tokens` prompt tokens; 0.0 without a curve."""
        if tokens <= 0:
            return 0.0
        chunk = min(tokens, PREFILL_TOKENS)
        seconds = self._kept(self._prefill_seconds, chunk, lambda model: model.verify.seconds(1, chunk))
        return tokens / chunk * (seconds or 0.0)

    def forget_estimates(self) -> None:
        """Makes the next ones anew."""
        self._round_seconds.clear()
        self._plain_seconds.clear()
        self._prefill_seconds.clear()
