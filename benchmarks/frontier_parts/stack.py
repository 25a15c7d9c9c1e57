"""The engine under closed-loop load, with the method of speculation switched between slices.

Small batches restart for every slice with the same prompts, so that single answers affect all methods
alike. Large batches are shared: methods take turns on the same running batch, which averages over prompts
anyway and would take long to prefill again.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dspark_core.algorithms.draft_policy import DraftCandidate
from dspark_core.algorithms.ngram_table import NgramTable
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.engine.building import BuiltTarget, EngineOptions, build_drafter
from dspark_core.engine.draft_engines.blocks import LocalDraftSource
from dspark_core.engine.drafts.drafting import Drafting
from dspark_core.engine.drafts.lookup import LookupDrafting
from dspark_core.engine.drafts.lookup_building import find_table
from dspark_core.engine.profiling.draft_profiler import profile_draft_time
from dspark_core.engine.profiling.profile_file import replica_kind
from dspark_core.engine.profiling.profiler import ProfileSettings, profile_step_time
from dspark_core.engine.protocols import DraftBlock, DraftSource, PlanSource
from dspark_core.engine.rounds.batching import BatchLimits
from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.rounds.planning import FullPlanSource
from dspark_core.engine.sequence import SequenceState
from dspark_core.records import GenerateRequest, RoundReport, SamplingParams
from dspark_core.zoo_paths import NGRAMS_AUTO

DRAFT_DEADLINE_SECONDS = 600.0
WARM_UP_ROUNDS = 2
RESTARTED_USERS = 8
"""Batches up to this size restart for every slice."""
PROFILED_REQUESTS = (1, 2, 4, 8, 16, 32, 64)
PROFILE_SECONDS = 8.0
MAX_FILL_ROUNDS = 200
"""Prefill takes a few rounds. With short answers, some may always be in prefill; that is a steady state."""
MIN_ROUNDS = 6
"""Minimum rounds per slice, however slow they are."""


@dataclass(frozen=True, slots=True)
class Method:
    name: str
    plans: PlanSource
    lookup: bool = False
    """Whether drafts also come from lookup, as in serving."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceResult:
    method: str
    concurrency: int
    seconds: float
    rounds: int
    tokens: int
    """Committed tokens, including those of prefill."""
    request_rounds: int
    drafted: int
    verified: int
    accepted: int
    batch_tokens: int
    """Sum over all rounds, prefill included."""
    step_seconds: float
    draft_seconds: float
    """Time spent waiting for drafts."""
    loop_seconds: float = 0.0
    hidden_draft_seconds: float = 0.0
    turns: int = 0
    """Rounds in which two cohorts took turns."""


class SwitchedPlans:
    """Delegates to the `PlanSource` of the current method and keeps the reports of its rounds."""

    def __init__(self) -> None:
        self.current: PlanSource = FullPlanSource()
        self.reports: list[RoundReport] = []

    def cohorts(self, candidates: Sequence[DraftCandidate], given: int | None) -> int:
        return self.current.cohorts(candidates, given)

    def wants_draft(self, candidates: Sequence[DraftCandidate]) -> tuple[bool, ...]:
        return self.current.wants_draft(candidates)

    def plan(self, requests: Sequence[PlanRequest], capacity: int | None = None) -> tuple[int, ...]:
        return self.current.plan(requests, capacity)

    def report(self, report: RoundReport) -> None:
        self.reports.append(report)
        self.current.report(report)


class SwitchedLookup(LookupDrafting):
    """Proposes only while the current method uses lookup, and learns nothing from other rounds."""

    def __init__(self, table: NgramTable | None) -> None:
        super().__init__(table)
        self.enabled = False

    def propose(self, sequences: Sequence[SequenceState]) -> dict[str, DraftBlock]:
        if self.enabled:
            return super().propose(sequences)
        self._looked.clear()
        return {}


def profile_round_time(
    target: BuiltTarget,
    source: DraftSource,
    options: EngineOptions,
    max_requests: int,
    clock: Callable[[], float],
) -> RoundTimeModel:
    """Profile as a verifier does at startup, with a larger time budget."""
    counts = tuple(count for count in PROFILED_REQUESTS if count <= max_requests)
    settings = ProfileSettings(requests=counts, budget_seconds=PROFILE_SECONDS)
    kind = replica_kind(options, target.engine)
    step = profile_step_time(target.engine, settings, key=kind, clock=clock)
    return RoundTimeModel(step, profile_draft_time(source, target.engine, counts, clock=clock))


class LoadedLoop:
    """A round loop that keeps a constant number of requests running."""

    def __init__(
        self,
        target: BuiltTarget,
        options: EngineOptions,
        prompts: Sequence[tuple[int, ...]],
        *,
        max_running: int,
        max_tokens: int,
        temperature: float,
        stop_token_ids: tuple[int, ...],
        seed: int = 0,
        profiled: bool = True,
        clock: Callable[[], float] = time.perf_counter,
        max_step_seconds: float | None = None,
        source: DraftSource | None = None,
        warm_up_rounds: int = WARM_UP_ROUNDS,
    ) -> None:
        """`profiled`: measure round times, which only time-aware planners need. `clock`: used for all times.
        `source`: source of the drafts; None: a drafter in this process."""
        self._clock = clock
        self._warm_up_rounds = warm_up_rounds
        if source is None:
            generator = torch.Generator().manual_seed(seed + 1)
            source = LocalDraftSource(build_drafter(options, target.loaded, generator=generator))
        # Before the loop, because profiling overwrites pages it has not allocated.
        self.round_time = (
            profile_round_time(target, source, options, max_running, clock) if profiled else None
        )
        self.plans = SwitchedPlans()
        self._lookup = SwitchedLookup(find_table(NGRAMS_AUTO, options.target_model, target.loaded))
        block = source.geometry.block_size
        self._loop = RoundLoop(
            target.engine,
            self.plans,
            drafting=Drafting(source, target.engine, deadline_seconds=DRAFT_DEADLINE_SECONDS, clock=clock),
            lookup=self._lookup,
            clock=clock,
            limits=BatchLimits(
                max_running=max_running,
                max_waiting=max_running,
                max_batch_tokens=max_running * (1 + block) + 256,
                max_step_seconds=max_step_seconds,
            ),
            generator=torch.Generator().manual_seed(seed),
            step_time=self.round_time.verify if self.round_time else None,
        )
        self._prompts = tuple(prompts)
        self._next_prompt = 0
        self._numbers = itertools.count()
        self._running: dict[str, None] = {}
        self._max_tokens = max_tokens
        self._sampling = SamplingParams(temperature=temperature)
        self._stop_token_ids = stop_token_ids

    def warm_prompts(self) -> None:
        """Put every prompt into the prefix cache, so that the first method does not pay for prefill alone."""
        self.plans.current = FullPlanSource()
        for index, prompt in enumerate(self._prompts):
            name = f"warm {index}"
            self._loop.submit(
                GenerateRequest(
                    request_id=name, prompt_token_ids=prompt, max_tokens=1, sampling=self._sampling
                )
            )
            while self._loop.has_work:
                self._loop.step()
        self.plans.reports.clear()

    def hold(self, concurrency: int, turn: int) -> None:
        """Bring the number of running requests to `concurrency`, all of them past prefill."""
        if len(self._running) == concurrency > RESTARTED_USERS:
            return  # keep the running batch
        if concurrency <= RESTARTED_USERS:
            self._cancel(0)
            # Each turn uses different prompts, the methods within a turn the same ones.
            self._next_prompt = turn * RESTARTED_USERS
        self._cancel(concurrency)
        for index in range(len(self._running), concurrency):
            # Spread the lengths; otherwise all requests would end and restart together.
            share = 1.0 if concurrency <= RESTARTED_USERS else (index + 1) / concurrency
            self._submit(max(8, round(self._max_tokens * share)))
        self.plans.current, self._lookup.enabled = FullPlanSource(), False
        for _ in range(MAX_FILL_ROUNDS):
            self._step()
            if len(self.plans.reports[-1].requests) >= concurrency:
                return

    def _cancel(self, left: int) -> None:
        while len(self._running) > left:
            self._loop.cancel(self._running.popitem()[0])
        self.plans.reports.clear()

    def run_slice(self, method: Method, concurrency: int, turn: int, seconds: float) -> SliceResult:
        """Run some unmeasured rounds, then measured ones for at least `seconds` and MIN_ROUNDS rounds."""
        self.hold(concurrency, turn)
        self.plans.current, self._lookup.enabled = method.plans, method.lookup
        for _ in range(self._warm_up_rounds):
            self._step()
        self.plans.reports.clear()
        tokens, started = 0, self._clock()
        while (elapsed := self._clock() - started) < seconds or len(self.plans.reports) < MIN_ROUNDS:
            tokens += self._step()
        reports = self.plans.reports
        requests = [request for report in reports for request in report.requests]
        return SliceResult(
            method=method.name,
            concurrency=concurrency,
            seconds=elapsed,
            rounds=len(reports),
            tokens=tokens,
            request_rounds=len(requests),
            drafted=sum(len(request.survival) for request in requests),
            verified=sum(request.verify_length for request in requests),
            accepted=sum(request.accepted for request in requests),
            batch_tokens=sum(report.batch_tokens for report in reports),
            step_seconds=sum(report.step_seconds for report in reports),
            draft_seconds=sum(report.draft_wait_seconds for report in reports),
            hidden_draft_seconds=sum(report.hidden_draft_seconds for report in reports),
            turns=sum(report.cohorts > 1 for report in reports),
            loop_seconds=sum(report.loop_seconds for report in reports),
        )

    def _step(self) -> int:
        """Run one round -> tokens committed. Every finished answer is replaced by the next prompt."""
        tokens = 0
        for output in self._loop.step():
            tokens += len(output.chunk.token_ids)
            if output.chunk.finish_reason is not None:
                del self._running[output.request_id]
                self._submit(self._max_tokens)
        return tokens

    def _submit(self, max_tokens: int) -> None:
        request_id = f"r{next(self._numbers)}"
        self._loop.submit(
            GenerateRequest(
                request_id=request_id,
                prompt_token_ids=self._prompts[self._next_prompt % len(self._prompts)],
                max_tokens=max_tokens,
                sampling=self._sampling,
                stop_token_ids=self._stop_token_ids,
            )
        )
        self._running[request_id] = None
        self._next_prompt += 1
