"""Breaks down rounds of the round loop: milliseconds in the target pass, acceptance and the rest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from torch import Tensor

from dspark_core.engine.rounds.batching import BatchLimits
from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.rounds.planning import FullPlanSource
from dspark_core.engine.target.batch import Run
from dspark_core.engine.target.target_engine import TargetEngine
from dspark_core.records import GenerateRequest, RoundReport, SamplingParams

PROMPT_TOKENS = 128


class _TimedPlans(FullPlanSource):
    """Records the loop's own measurement of a pass plus acceptance."""

    def __init__(self) -> None:
        self.step_seconds = 0.0

    def report(self, report: RoundReport) -> None:
        self.step_seconds = report.step_seconds


def measure_rounds(engine: TargetEngine, *, requests: int, rounds: int) -> dict[str, float]:
    """Medians over rounds of plain greedy decoding, in milliseconds."""
    plans = _TimedPlans()
    loop = RoundLoop(engine, plans, limits=BatchLimits(max_running=requests))
    forward, inside = engine.forward, [0.0]

    def timed(runs: Sequence[Run]) -> Tensor:
        started = time.perf_counter()
        logits = forward(runs)
        inside[0] = time.perf_counter() - started
        return logits

    engine.forward = timed  # type: ignore[method-assign]
    for index in range(requests):
        prompt = tuple(range(1000 + index, 1000 + index + PROMPT_TOKENS))
        loop.submit(
            GenerateRequest(
                request_id=str(index),
                prompt_token_ids=prompt,
                max_tokens=rounds + 64,
                sampling=SamplingParams(temperature=0.0),
            )
        )
    samples: list[tuple[float, float, float]] = []
    while len(samples) < rounds:
        started = time.perf_counter()
        outputs = loop.step()
        whole = time.perf_counter() - started
        if len(outputs) == requests:  # not during prefill
            samples.append((whole, inside[0], plans.step_seconds - inside[0]))
    engine.forward = forward  # type: ignore[method-assign]
    whole, passed, accepted = (statistics.median(column) * 1e3 for column in zip(*samples, strict=True))
    return {
        "round": whole,
        "target pass": passed,
        "planning and acceptance": accepted,
        "bookkeeping": whole - passed - accepted,
    }
