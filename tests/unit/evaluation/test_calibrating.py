"""From rounds to a stored calibration, by the engine itself on the golden checkpoints."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from dspark_core.algorithms.calibration import sigmoid
from dspark_core.engine.building import EngineOptions, build_drafter, build_target
from dspark_core.engine.draft_engines.blocks import LocalDraftSource
from dspark_core.errors import ConfigError
from dspark_core.evaluation.calibrating import (
    CalibrationStudy,
    round_logits,
    split_prompts,
    study_calibration,
)
from dspark_core.evaluation.confidence import measure_confidence
from dspark_core.evaluation.reliability_plot import RELIABILITY_FILE, draw_reliability
from dspark_core.evaluation.round_table import DraftRound, RoundTable
from dspark_core.evaluation.runner import EvalPrompt, EvalRun, EvalRunner, EvalSettings
from dspark_core.models.drafter_calibration import CALIBRATION_FILE, read_calibration, write_calibration

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
VOCAB = 512


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(GOLDEN / "dspark_vanilla", tmp_path_factory.mktemp("drafter") / "copy"))


def prompts(count: int) -> list[EvalPrompt]:
    source = random.Random(5)
    drawn = ([source.randrange(2, VOCAB) for _ in range(source.randint(4, 12))] for _ in range(count))
    return [EvalPrompt(set_name="tiny", row=row, token_ids=tuple(ids)) for row, ids in enumerate(drawn)]


def generate(checkpoint: Path, asked: list[EvalPrompt], *, calibrated: bool) -> tuple[EvalRun, str]:
    options = EngineOptions(
        target_model=str(GOLDEN / "qwen3_tiny_target"),
        drafter=str(checkpoint),
        dtype="float32",
        kv_cache_bytes=2**23,
    )
    target = build_target(options)
    drafter = build_drafter(options, target.loaded, calibrated=calibrated)
    settings = EvalSettings(max_tokens=24, temperature=0.0, concurrency=16)
    runner = EvalRunner(target.engine, LocalDraftSource(drafter), settings, stop_token_ids=(1,))
    return runner.run(asked), drafter.geometry.fingerprint


def study_of(run: EvalRun, asked: list[EvalPrompt]) -> CalibrationStudy:
    fit, _ = split_prompts(asked)
    ids = {prompt.request_id for prompt in fit}
    return study_calibration(
        [one for one in run.answered if one.prompt.request_id in ids],
        [one for one in run.answered if one.prompt.request_id not in ids],
        7,
    )


def test_rounds_to_a_stored_calibration_and_back(checkpoint: Path, tmp_path: Path):
    asked = prompts(48)
    run, fingerprint = generate(checkpoint, asked, calibrated=False)
    study = study_of(run, asked)
    assert len(study.calibration.scaling.temperatures) == 7
    assert study.calibration.rounds == tuple(quality.rounds for quality in study.fitted.before)
    assert min(quality.rounds for quality in study.held_out.before) > 50
    # A drafter trained for a moment is far from calibrated; half of the prompts repair the other half.
    before, after = study.held_out.mean_ece
    assert after < before
    assert study.fitted.mean_ece[1] < study.fitted.mean_ece[0]

    path = draw_reliability(study, tmp_path / "plots")
    assert path.name == RELIABILITY_FILE
    assert path.read_bytes().startswith(b"\x89PNG")

    write_calibration(checkpoint / CALIBRATION_FILE, study.calibration, fingerprint=fingerprint)
    stored = read_calibration(checkpoint, fingerprint=fingerprint, block_size=7, confidence_head=True)
    assert stored == study.calibration
    served, _ = generate(checkpoint, asked, calibrated=True)
    assert _answers(served) == _answers(run)
    # What the engine now says about the held-out prompts is what the study promised.
    held_out = {prompt.request_id for prompt in split_prompts(asked)[1]}
    rounds = [one for each in served.answered if each.prompt.request_id in held_out for one in each.rounds]
    measured = measure_confidence(RoundTable.from_rounds(rounds))
    assert [one.rounds for one in measured] == [quality.rounds for quality in study.held_out.after]
    assert [one.brier for one in measured] == pytest.approx(
        [quality.brier for quality in study.held_out.after], abs=1e-4
    )


def _answers(run: EvalRun) -> dict[str, tuple[int, ...]]:
    return {one.prompt.request_id: one.token_ids for one in run.answered}


def test_logits_come_back_from_survival():
    logits = np.array([[2.0, -1.0, 0.5], [0.1, 4.0, -3.0]])
    survival = np.cumprod(sigmoid(logits), axis=1)
    table = RoundTable.from_rounds(
        [
            DraftRound(drafted=3, verified=3, accepted=1, committed=2, survival=tuple(survival[0])),
            DraftRound(drafted=0, verified=0, accepted=0, committed=1),
            DraftRound(drafted=2, verified=2, accepted=2, committed=3, survival=tuple(survival[1, :2])),
            DraftRound(
                drafted=3, verified=3, accepted=2, committed=2, stopped=True, survival=tuple(survival[1])
            ),
        ]
    )
    found = round_logits(table, 4)
    assert found.accepted.tolist() == [1, 2, 2]
    # The short draft ends after two; the last round's stop token was the second.
    assert found.proposed.tolist() == [3, 2, 2]
    assert found.logits[0, :3] == pytest.approx(logits[0])
    assert found.logits[1, :2] == pytest.approx(logits[1, :2])
    assert np.isnan(found.logits[:, 3]).all()


def test_no_survival_ends_in_a_finite_logit():
    table = RoundTable.from_rounds(
        [DraftRound(drafted=3, verified=3, accepted=0, committed=1, survival=(0.5, 0.0, 0.0))]
    )
    assert np.isfinite(round_logits(table, 3).logits).all()


def test_halves_share_every_set_and_no_prompt():
    asked = [
        EvalPrompt(set_name=name, row=row, token_ids=(3,)) for name in ("chat", "code") for row in range(5)
    ]
    fit, held_out = split_prompts(asked)
    assert {one.set_name for one in fit} == {one.set_name for one in held_out} == {"chat", "code"}
    assert sorted(one.request_id for one in (*fit, *held_out)) == sorted(one.request_id for one in asked)
    with pytest.raises(ConfigError, match="at least 2 prompts, half of them held out, got 1"):
        split_prompts(asked[:1])


def test_no_rounds_are_an_error():
    with pytest.raises(ConfigError, match="no round with drafts"):
        study_calibration([], [], 7)
