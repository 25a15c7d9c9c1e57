"""This project's engine: the round loop, with speculation on or off."""

from __future__ import annotations

import time
from dataclasses import replace

from benchmarks.peers_parts.contract import Outcome, Stopwatch, Trial, Users
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.engine.building import EngineOptions, build_drafter, build_target
from dspark_core.engine.draft_engines.blocks import LocalDraftSource
from dspark_core.engine.drafts.drafting import Drafting
from dspark_core.engine.drafts.lookup_building import build_lookup
from dspark_core.engine.profiling.draft_profiler import profile_draft_time
from dspark_core.engine.profiling.profiler import profile_step_time
from dspark_core.engine.rounds.batching import BatchLimits
from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.rounds.planning import LocalPlanSource
from dspark_core.records import GenerateRequest, SamplingParams, SpeculationOptions
from dspark_core.zoo_paths import NGRAMS_AUTO


class NativePeer:
    def __init__(self, options: EngineOptions, *, max_requests: int) -> None:
        """Speculates if the options name a drafter; then, as in `dspark up`, also by lookup."""
        self._speculate = options.drafter is not None
        target = build_target(options)
        drafting, lookup = None, None
        round_time = RoundTimeModel(profile_step_time(target.engine))
        if self._speculate:
            source = LocalDraftSource(build_drafter(options, target.loaded))
            round_time = replace(round_time, draft=profile_draft_time(source, target.engine))
            drafting = Drafting(source, target.engine, deadline_seconds=60.0)
            lookup = build_lookup(NGRAMS_AUTO, options.target_model, target.loaded)
        self._loop = RoundLoop(
            target.engine,
            LocalPlanSource(round_time),
            drafting=drafting,
            lookup=lookup,
            limits=BatchLimits(max_running=max_requests),
        )
        self._trials = 0

    def run(self, trial: Trial) -> Outcome:
        self._trials += 1
        watch = Stopwatch(trial, time.perf_counter())
        names: dict[str, int] = {}

        def ask(index: int) -> None:
            name = f"{self._trials}-{index}"
            names[name] = index
            watch.ask(index, time.perf_counter())
            self._loop.submit(
                GenerateRequest(
                    request_id=name,
                    prompt_token_ids=trial.prompts[index],
                    max_tokens=trial.max_tokens,
                    sampling=SamplingParams(temperature=0.0),
                    speculation=SpeculationOptions(enabled=self._speculate),
                )
            )

        users = Users(trial, ask)
        lengths: list[float] = []
        while self._loop.has_work:
            outputs = self._loop.step()
            now = time.perf_counter()
            for output in outputs:
                chunk = output.chunk
                watch.add(names[output.request_id], chunk.token_ids, now)
                if chunk.finish_reason is not None:
                    lengths += [] if chunk.stats is None else [chunk.stats.accepted_length]
                    users.next()
        return watch.outcome(sum(lengths) / max(1, len(lengths)))
