"""Fits a drafter's confidence calibration to recorded rounds and evaluates it on held-out prompts."""

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
    """Rounds in the form that calibration takes."""

    logits: Floats  # [rounds, block]
    accepted: NDArray[np.int64]  # [rounds]
    proposed: NDArray[np.int64]  # [rounds], without those after an accepted stop token

    def survival(self, scaling: ConfidenceScaling | None) -> tuple[tuple[Floats, Floats], ...]:
        """Per position, over the n rounds that proposed it: predicted [n] and observed [n] survival."""
        return survival_by_position(self.logits, self.accepted, self.proposed, scaling)

    def quality(self, scaling: ConfidenceScaling | None) -> tuple[PositionQuality, ...]:
        return position_quality(self.logits, self.accepted, self.proposed, scaling)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """Quality of predicted survival on one half of the prompts, by position, before and after calibration."""

    before: tuple[PositionQuality, ...]
    after: tuple[PositionQuality, ...]

    @property
    def mean_ece(self) -> tuple[float, float]:
        """Mean ECE before and after calibration, over the positions that any round proposed."""
        return _mean_ece(self.before), _mean_ece(self.after)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationStudy:
    calibration: Calibration
    fitted: Judgement
    """On the half that the scaling was fitted to."""
    held_out: Judgement
    held_out_rounds: RoundLogits
    """For reliability diagrams."""


def split_prompts(prompts: Sequence[EvalPrompt]) -> tuple[list[EvalPrompt], list[EvalPrompt]]:
    """Alternate prompts between fit and held-out halves, so that both cover all prompt sets."""
    if len(prompts) < 2:
        raise ConfigError(f"calibration needs at least 2 prompts, half of them held out, got {len(prompts)}")
    return list(prompts[0::2]), list(prompts[1::2])


def study_calibration(
    fit: Sequence[AnsweredPrompt], held_out: Sequence[AnsweredPrompt], block_size: int
) -> CalibrationStudy:
    """Fit a scaling on one half and evaluate it on both. Raises ConfigError if no round has drafts."""
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
    """Rounds of a drafter with a confidence head whose confidences are not calibrated yet.

    Confidences are recovered from survival, as ratios of successive values. Past a survival of 0 they cannot
    be, but nothing depends on them there.
    """
    usable = table.verified > 0
    survival = np.full((int(usable.sum()), block_size), np.nan)
    survival[:, : table.positions] = table.survival[usable]
    before = np.concatenate((np.ones((len(survival), 1)), survival[:, :-1]), axis=1)
    confidences = np.divide(survival, before, out=np.where(np.isnan(survival), np.nan, 0.0), where=before > 0)
    return RoundLogits(
        logits=confidence_logits(confidences),
        accepted=table.accepted[usable],
        # Draft tokens after an accepted stop token have no outcome.
        proposed=np.where(table.stopped, table.accepted, table.verified)[usable],
    )


def _rounds_of(answered: Iterable[AnsweredPrompt], block_size: int) -> RoundLogits:
    return round_logits(RoundTable.from_rounds([one for each in answered for one in each.rounds]), block_size)


def _judge(rounds: RoundLogits, calibration: Calibration) -> Judgement:
    return Judgement(before=rounds.quality(None), after=rounds.quality(calibration.scaling))


def _mean_ece(positions: Iterable[PositionQuality]) -> float:
    errors = [quality.ece for quality in positions if quality.rounds]
    return float(np.mean(errors)) if errors else 0.0
