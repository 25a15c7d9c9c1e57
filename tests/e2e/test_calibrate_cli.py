"""`dspark calibrate` with the demo model and a copy of the shipped drafter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dspark_core.models.drafter_calibration import CALIBRATION_FILE
from dspark_core.zoo_paths import resolve_drafter_path
from services.cli.main import main

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.timeout(400)]

QUESTIONS = ("What is the capital of France?", "Write a haiku about the sea.", "What is 2 + 3?")
SMALL = ["--kv-cache-mb", "64", "--threads", "1", "--max-tokens", "8"]
GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"turns": [text]}) + "\n" for text in QUESTIONS), encoding="utf-8")
    return path


def test_calibrate_shows_stores_and_draws(prompts: Path, tmp_path: Path, capsys) -> None:
    drafter = tmp_path / "drafter"
    shutil.copytree(resolve_drafter_path(), drafter, ignore=shutil.ignore_patterns(CALIBRATION_FILE))
    out, plots = tmp_path / "results" / "calibration.json", tmp_path / "plots"
    where = ["--drafter", str(drafter), "--write", "--out", str(out), "--plots", str(plots)]
    assert main(["calibrate", str(prompts), *where, *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "mean ECE on held-out prompts" in shown
    assert "more prompts give reliable figures" in shown
    stored = json.loads((drafter / CALIBRATION_FILE).read_text())
    assert stored == json.loads(out.read_text())
    block_size = json.loads((drafter / "config.json").read_text())["block_size"]
    lengths = {len(stored[name]) for name in ("temperatures", "rounds", "ece_before", "ece_after")}
    assert lengths == {block_size}
    assert stored["rounds"][0] > 0
    assert stored["ece_after"][0] <= stored["ece_before"][0]
    assert [path.suffix for path in plots.iterdir()] == [".png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{prompts}", "--limit", "0"], "--limit must be >= 1, got 0"),
        (["{prompts}", "--limit", "1"], "at least 2 prompts, half of them held out, got 1"),
        (["{prompts}", "--temperature", "-1"], "temperature must be in [0, 100], got -1.0"),
        (["{prompts}", "--drafter", "none"], "--drafter must name one, got 'none'"),
        (["{prompts}", "--drafter", str(GOLDEN / "dflash")], "has no confidence head"),
        (["{prompts}", "--out", "{prompts}/x.json"], "cannot write to"),
        (["{prompts}.missing"], "not found"),
    ],
)
def test_what_cannot_be_calibrated_is_said_in_one_line(
    arguments: list[str], message: str, prompts: Path, capsys
) -> None:
    assert main(["calibrate", *(text.format(prompts=prompts) for text in arguments)]) > 0
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize("option", [["--lookup"], ["--no-lookup"], ["--ngrams", "none"]])
def test_options_of_lookup_are_not_taken(option: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        main(["calibrate", "questions.jsonl", *option])
    assert f"unrecognized arguments: {' '.join(option)}" in capsys.readouterr().err
