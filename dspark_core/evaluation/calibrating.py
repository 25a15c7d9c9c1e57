"""Fits a drafter's calibration to recorded rounds, and judges it on rounds of other prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark_core.algorithms.calibration import (
    Calibration,
    ConfidenceScaling,
    PositionQuality,
    calibrate,
    confidence_logits,
    position_quality,
    survival_by_position,
)
from dspark_core.errors import ConfigError
from dspark_core.evaluation.round_table import RoundTable
from dspark_core.evaluation.runner import AnsweredPrompt, EvalPrompt

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundLogits:
    """Rounds as the fit reads them."""

    logits: Floats  # [rounds, block]
    accepted: NDArray[np.int64]  # [rounds]
    proposed: NDArray[np.int64]  # [rounds], those after a stop token not counted

    def survival(self, scaling: ConfidenceScaling | None) -> tuple[tuple[Floats, Floats], ...]:
        """Per position, over the n rounds that proposed it: estimates [n] and outcomes [n]."""
        return survival_by_position(self.logits, self.accepted, self.proposed, scaling)

    def quality(self, scaling: ConfidenceScaling | None) -> tuple[PositionQuality, ...]:
        return position_quality(self.logits, self.accepted, self.proposed, scaling)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """Survival on one half of the prompts, by position, without and with the calibration."""

    before: tuple[PositionQuality, ...]
    after: tuple[PositionQuality, ...]

    @property
    def mean_ece(self) -> tuple[float, float]:
        """Before and after, over the positions that any round proposed."""
        return _mean_ece(self.before), _mean_ece(self.after)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationStudy:
    calibration: Calibration
    fitted: Judgement
    """On the half the scaling was fitted to."""
    held_out: Judgement
    held_out_rounds: RoundLogits
    """For reliability diagrams."""


def split_prompts(prompts: Sequence[EvalPrompt]) -> tuple[list[EvalPrompt], list[EvalPrompt]]:
    """Every other prompt for the fit, the rest held out: both halves hold all prompt sets."""
    if len(prompts) < 2:
        raise ConfigError(f"calibration needs at least 2 prompts, half of them held out, got {len(prompts)}")
    return list(prompts[0::2]), list(prompts[1::2])


def study_calibration(
    fit: Sequence[AnsweredPrompt], held_out: Sequence[AnsweredPrompt], block_size: int
) -> CalibrationStudy:
    """A scaling from one half, judged on both. Raises ConfigError where there is nothing to fit."""
    rounds = _rounds_of(fit, block_size)
    unseen = _rounds_of(held_out, block_size)
    if not len(rounds.logits):
        raise ConfigError("nothing to calibrate with: the prompts gave no round with drafts")
    calibration = calibrate(rounds.logits, rounds.accepted, rounds.proposed)
    return CalibrationStudy(
        calibration=calibration,
        fitted=_judge(rounds, calibration),
        held_out=_judge(unseen, calibration),
        held_out_rounds=unseen,
    )


def round_logits(table: RoundTable, block_size: int) -> RoundLogits:
    """Rounds of a drafter with a confidence head whose confidences were not calibrated yet.

    Confidences come back from survival; beyond a survival of 0 nothing can be told, and nothing
    depends on it.
    """
    usable = table.verified > 0
    survival = np.full((int(usable.sum()), block_size), np.nan)
    survival[:, : table.positions] = table.survival[usable]
    before = np.concatenate((np.ones((len(survival), 1)), survival[:, :-1]), axis=1)
    confidences = np.divide(survival, before, out=np.where(np.isnan(survival), np.nan, 0.0), where=before > 0)
    return RoundLogits(
        logits=confidence_logits(confidences),
        accepted=table.accepted[usable],
        # Drafts after an accepted stop token were never put to the test.
        proposed=np.where(table.stopped, table.accepted, table.verified)[usable],
    )


def _rounds_of(answered: Iterable[AnsweredPrompt], block_size: int) -> RoundLogits:
    return round_logits(RoundTable.from_rounds([one for each in answered for one in each.rounds]), block_size)


def _judge(rounds: RoundLogits, calibration: Calibration) -> Judgement:
    return Judgement(before=rounds.quality(None), after=rounds.quality(calibration.scaling))


def _mean_ece(positions: Iterable[PositionQuality]) -> float:
    errors = [quality.ece for quality in positions if quality.rounds]
    return float(np.mean(errors)) if errors else 0.0
