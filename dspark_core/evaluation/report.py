"""The figures of an evaluation: per prompt set, and their unweighted mean over the sets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

from dspark_core.evaluation.acceptance import Acceptance, measure_acceptance
from dspark_core.evaluation.confidence import PositionConfidence, measure_confidence
from dspark_core.evaluation.round_table import RoundTable
from dspark_core.evaluation.runner import EvalRun
from dspark_core.evaluation.threshold_sweep import SweepPoint, sweep_thresholds

FORMAT = "dspark-eval-1"
"""Changes whenever the meaning of a field changes."""

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class SetReport:
    name: str
    prompts: int
    """Number of answered prompts."""
    too_long_prompts: int
    """Number of prompts skipped because they leave no room in the context."""
    generated_tokens: int
    acceptance: Acceptance
    confidence: tuple[PositionConfidence, ...]
    """Empty for drafters without a confidence head."""
    mean_ece: float | None
    """Mean expected calibration error over positions."""
    sweep: tuple[SweepPoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MacroReport:
    """Unweighted means over sets; a set without a value is left out of that mean."""

    accepted_length: float | None
    verify_length: float | None
    acceptance_rate: float | None
    accept_rate: tuple[float | None, ...]
    """By position, starting at the first."""
    survival: tuple[float | None, ...]
    ece: tuple[float | None, ...]
    mean_ece: float | None
    sweep: tuple[SweepPoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    arguments: dict[str, object]
    environment: dict[str, object]
    seconds: float
    """Time to generate, without loading."""
    sets: tuple[SetReport, ...]
    macro: MacroReport

    def document(self) -> dict[str, object]:
        """As a JSON-serialisable dict."""
        return {"format": FORMAT, **dataclasses.asdict(self)}


def report_sets(run: EvalRun, names: Sequence[str]) -> tuple[SetReport, ...]:
    """One report per set name, in that order."""
    return tuple(_report_set(run, name) for name in names)


def _report_set(run: EvalRun, name: str) -> SetReport:
    answered = [one for one in run.answered if one.prompt.set_name == name]
    table = RoundTable.from_rounds([drafted for one in answered for drafted in one.rounds])
    confidence = measure_confidence(table)
    return SetReport(
        name=name,
        prompts=len(answered),
        too_long_prompts=sum(prompt.set_name == name for prompt in run.too_long),
        generated_tokens=sum(len(one.token_ids) for one in answered),
        acceptance=measure_acceptance(table),
        confidence=confidence,
        mean_ece=_mean(one.ece for one in confidence),
        sweep=sweep_thresholds(table),
    )


def macro_mean(sets: Sequence[SetReport]) -> MacroReport:
    acceptances = [one.acceptance for one in sets]
    width = max((len(one.positions) for one in acceptances), default=0)
    positions = [[one.positions[k] for one in acceptances if k < len(one.positions)] for k in range(width)]
    return MacroReport(
        accepted_length=_mean(one.accepted_length for one in acceptances),
        verify_length=_mean(one.verify_length for one in acceptances),
        acceptance_rate=_mean(one.acceptance_rate for one in acceptances),
        accept_rate=tuple(_mean(one.accept_rate for one in column) for column in positions),
        survival=tuple(_mean(one.survival for one in column) for column in positions),
        ece=tuple(_mean(_ece_at(one, k) for one in sets) for k in range(1, width + 1)),
        mean_ece=_mean(one.mean_ece for one in sets),
        sweep=_macro_sweep([one.sweep for one in sets if one.sweep]),
    )


def _ece_at(report: SetReport, position: int) -> float | None:
    return next((one.ece for one in report.confidence if one.position == position), None)


def _macro_sweep(sweeps: Sequence[tuple[SweepPoint, ...]]) -> tuple[SweepPoint, ...]:
    return tuple(
        SweepPoint(
            threshold=points[0].threshold,
            verify_length=_mean_of(points, lambda point: point.verify_length),
            acceptance_rate=_mean(point.acceptance_rate for point in points),
            accepted_length=_mean_of(points, lambda point: point.accepted_length),
        )
        for points in zip(*sweeps, strict=True)
    )


def _mean_of(items: Sequence[_Item], value: Callable[[_Item], float]) -> float:
    return fmean(value(item) for item in items)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return fmean(known) if known else None
