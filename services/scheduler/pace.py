"""What a verifier's rounds say about its speed: round time at any load, tokens a request gets of one."""

from __future__ import annotations

import math

from dspark_core.algorithms.cohorts import COHORTS, cycle_seconds
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.records import RoundReport, StepTime

SMOOTHING = 0.1
"""Weight of the newest round in running means."""
FORGET_SECONDS = 5.0
"""A slowdown of a verifier that does nothing is forgotten with this time constant."""
PREFILL_TOKENS = 256
"""Prompts are costed by passes of this size."""


class VerifierPace:
    """Starts knowing nothing; `profile` and `observe` teach it."""

    def __init__(self) -> None:
        self.model: RoundTimeModel | None = None
        self._profile: tuple[StepTime, ...] = ()
        self._tokens_per_request = 1.0
        self._accepted_length = 1.0
        self._context_per_request = 0.0
        self._drafted_share = 0.0
        self._in_turns = False

    def adopt(self, profile: tuple[StepTime, ...], *, begins: bool = False) -> None:
        """Starts from what was measured; a repeated profile changes nothing: what was learned on
        top of it is better. `begins`: a stream, whose first report tells all that was measured."""
        if begins and not profile:
            self._profile = ()  # it may be another one at the address, which does not measure
        if not profile or profile == self._profile:
            return
        self._profile = profile
        self.model = RoundTimeModel(StepTimeModel.of_step_times(profile))

    @property
    def profiled(self) -> bool:
        """The verifier measured its step times itself."""
        return bool(self._profile)

    @property
    def measured(self) -> bool:
        """It, or another of its kind, was profiled; else all there is was learned from its own rounds."""
        return self.model is not None and not self.model.verify.learned

    def start_from(self, model: StepTimeModel) -> None:
        """What others of its kind know, for a verifier that was not measured."""
        self.model = RoundTimeModel(model)

    def observe(self, report: RoundReport) -> None:
        requests = len(report.requests)
        decoded = sum(1 + request.verify_length for request in report.requests)
        # A prompt's chunk in the step makes it another kind of step.
        if requests and report.batch_tokens == decoded and report.step_seconds > 0:
            point = (requests, decoded, report.context_tokens, report.step_seconds)
            if self.model is None:
                self.model = RoundTimeModel(StepTimeModel.learn(*point))
            else:
                self.model = self.model.observed_step(*point)
        drafted = sum(request.drafted for request in report.requests)
        if self.model is not None and drafted and report.draft_seconds > 0 and not report.drafter_primed:
            self.model = self.model.observed_draft(
                drafted, report.draft_seconds, report.draft_compute_seconds or None
            )
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
            self._drafted_share += SMOOTHING * (drafted / count - self._drafted_share)

    @property
    def accepted_length(self) -> float:
        """Tokens a request gets of a round, the bonus token included."""
        return self._accepted_length

    def round_seconds(self, requests: int) -> float | None:
        """Until so many requests like those seen have all had a round; None: no curve."""
        if self.model is None:
            return None
        of_all = (
            requests,
            max(requests, round(requests * self._tokens_per_request)),
            round(requests * self._context_per_request),
            round(requests * self._drafted_share),
        )
        in_turns = self._in_turns and requests >= COHORTS
        return cycle_seconds(self.model, *of_all) if in_turns else self.model.seconds(*of_all)

    def relaxation(self, idle_seconds: float) -> float:
        """What to multiply round times by that were last seen so long ago.

        A slowdown is forgotten: a verifier that gets no requests cannot show that it is over.
        """
        if self.model is None or self.model.verify.scale <= 1.0:
            return 1.0
        return float(self.model.verify.scale ** (math.exp(-idle_seconds / FORGET_SECONDS) - 1.0))

    def tokens_per_second(self, requests: int) -> float | None:
        """What each of so many requests gets; None: no curve."""
        seconds = self.round_seconds(requests)
        return None if seconds is None else self._accepted_length / seconds

    def undisturbed_tokens_per_second(self) -> float | None:
        """What a lone request gets where nothing slows the verifier down; None: no curve."""
        alone = self.tokens_per_second(1)
        return None if alone is None else alone / self.relaxation(math.inf)

    def prefill_seconds(self, tokens: int) -> float:
        """Of so many prompt tokens; 0.0 without a curve."""
        if self.model is None or tokens <= 0:
            return 0.0
        chunk = min(tokens, PREFILL_TOKENS)
        return tokens / chunk * self.model.verify.seconds(1, chunk)
