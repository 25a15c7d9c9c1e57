"""Corrects profiled round times with measurements from served rounds.

A profile times bare passes for a few seconds. A served round also plans, accepts and samples, on a machine
that may have become busier. Each profile point is scaled by the ratio of measured to profiled time of
similar rounds, so the profile keeps its shape.

`RoundTimeModel.learned`, by which serving does the same, follows the newest rounds, one after the other. Here
all of them are there at once and count the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dspark_core.algorithms.loop_time import LoopTimeModel
from dspark_core.algorithms.round_time import DraftTimeModel, RoundTimeModel
from dspark_core.algorithms.step_surface import StepPoint

MIN_ROUNDS = 3
"""Minimum number of similar rounds for a correction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedRound:
    """A round without prefill."""

    requests: int
    batch_tokens: int
    context_tokens: int
    step_seconds: float
    drafted: int
    """Number of requests drafted for."""
    draft_seconds: float
    loop_seconds: float = 0.0


def corrected(round_time: RoundTimeModel, rounds: Iterable[ServedRound]) -> RoundTimeModel:
    """Parts of the model without MIN_ROUNDS rounds of any one kind stay unchanged."""
    rounds = tuple(rounds)
    steps: dict[tuple[int, int], list[float]] = {}
    drafts: dict[int, list[float]] = {}
    for one in rounds:
        known = round_time.verify.seconds(one.requests, one.batch_tokens, one.context_tokens)
        steps.setdefault((one.requests, one.batch_tokens), []).append(one.step_seconds / known)
        expected = round_time.draft.seconds(one.drafted)
        if one.drafted and expected > 0:
            drafts.setdefault(one.drafted, []).append(one.draft_seconds / expected)
    step_ratios: dict[int, dict[float, float]] = {}
    for (requests, tokens), ratios in steps.items():
        if len(ratios) >= MIN_ROUNDS:
            step_ratios.setdefault(requests, {})[tokens / requests] = statistics.median(ratios)
    draft_ratios = {
        count: statistics.median(ratios) for count, ratios in drafts.items() if len(ratios) >= MIN_ROUNDS
    }
    verify = round_time.verify
    if step_ratios:
        points = tuple(_moved(point, step_ratios) for point in verify.points)
        verify = replace(verify, points=points)
    draft = round_time.draft
    if draft_ratios:
        seconds = zip(draft.requests, draft.draft_seconds, strict=True)
        draft = DraftTimeModel(
            draft.requests, tuple(value * _between(draft_ratios, count) for count, value in seconds)
        )
    return replace(round_time, verify=verify, draft=draft, loop=_loop(rounds) or round_time.loop)


def _loop(rounds: Sequence[ServedRound]) -> LoopTimeModel | None:
    """Line fitted to the median loop times by request count; constant if there is only one count."""
    by_requests: dict[int, list[float]] = {}
    for one in rounds:
        if one.loop_seconds > 0:
            by_requests.setdefault(one.requests, []).append(one.loop_seconds)
    medians = {
        n: statistics.median(seconds) for n, seconds in by_requests.items() if len(seconds) >= MIN_ROUNDS
    }
    if not medians:
        return None
    counts, seconds = np.array(list(medians), dtype=np.float64), np.array(list(medians.values()))
    slope = 0.0
    if len(medians) > 1:
        slope = max(float(np.cov(counts, seconds, bias=True)[0, 1] / counts.var()), 0.0)
    return LoopTimeModel(max(float(seconds.mean() - slope * counts.mean()), 0.0), slope)


def _moved(point: StepPoint, ratios: Mapping[int, Mapping[float, float]]) -> StepPoint:
    """Scaled by the ratio at its tokens per request, interpolated between served request counts."""
    per_request = point.batch_tokens / point.requests
    rows = {requests: _between(row, per_request) for requests, row in ratios.items()}
    return replace(point, seconds=point.seconds * _between(rows, point.requests))


def _between(known: Mapping[int, float] | Mapping[float, float], at: float) -> float:
    """Linear interpolation between keys, constant beyond them."""
    keys = sorted(known)
    return float(np.interp(at, keys, [known[key] for key in keys]))  # type: ignore[index]
