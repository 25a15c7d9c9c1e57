"""`dspark eval` with the demo model and the shipped drafter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.cli.main import main

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.timeout(400)]

QUESTIONS = ("What is the capital of France?", "Write a haiku about the sea.")
SMALL = ["--dtype", "float32", "--kv-cache-mb", "64", "--threads", "1"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    rows = [{"id": str(n), "turns": [text, "ignored"]} for n, text in enumerate(QUESTIONS)]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def test_eval_measures_writes_draws_and_compares(prompts: Path, tmp_path: Path, capsys) -> None:
    out, plots = tmp_path / "results" / "greedy.json", tmp_path / "plots"
    protocol = ["--temperature", "0", "--max-tokens", "8", "--seed", "5"]
    assert main(["eval", str(prompts), "--out", str(out), "--plots", str(plots), *protocol, *SMALL]) == 0
    assert "questions" in capsys.readouterr().out
    document = json.loads(out.read_text())
    (one,) = document["sets"]
    acceptance = one["acceptance"]
    assert (one["name"], one["prompts"], one["too_long_prompts"]) == ("questions", 2, 0)
    assert acceptance["accepted_length"] == acceptance["committed_tokens"] / acceptance["rounds"]
    # Each answer's first token comes from prefill.
    assert one["generated_tokens"] == acceptance["committed_tokens"] + 2
    assert len(acceptance["positions"]) == len(one["confidence"]) == 7
    assert len(document["macro"]["sweep"]) == 20
    assert document["macro"]["sweep"][0]["accepted_length"] == acceptance["accepted_length"]
    assert document["arguments"]["seed"] == 5
    assert document["environment"]["packages"]["torch"]
    assert len(list(plots.glob("*.png"))) == 2
    assert main(["eval", "--compare", str(out), str(out)]) == 0
    shown = capsys.readouterr().out
    assert "+0.0 %" in shown
    assert "like for like" not in shown


def test_eval_measures_what_requests_are_served_with(prompts: Path, tmp_path: Path, capsys) -> None:
    protocol = ["--temperature", "0", "--max-tokens", "24", *SMALL]
    lengths = {}
    for drafts in ("lookup", "served"):
        out = tmp_path / f"{drafts}.json"
        assert main(["eval", str(prompts), "--drafts", drafts, "--out", str(out), *protocol]) == 0
        (one,) = json.loads(out.read_text())["sets"]
        lengths[drafts] = one["acceptance"]["accepted_length"]
        assert one["confidence"] == []
    assert "threshold sweep: drafts are not the drafter's alone" in capsys.readouterr().out
    assert all(length > 1.0 for length in lengths.values())


def test_answers_of_one_token_are_no_missing_confidence_head(prompts: Path, capsys) -> None:
    assert main(["eval", str(prompts), "--limit", "1", "--max-tokens", "1", *SMALL]) == 0
    assert "threshold sweep: no draft was verified" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "eval needs prompt files"),
        (
            ["{prompts}", "--drafts", "served", "--no-lookup"],
            "--drafts served cannot be used with --no-lookup",
        ),
        (["{prompts}", "--lookup"], "--lookup cannot be used with --drafts drafter"),
        (
            ["{prompts}", "--ngrams", "t.safetensors"],
            "--ngrams t.safetensors cannot be used with --drafts drafter: give --drafts served or lookup",
        ),
        (["{prompts}", "--limit", "0"], "--limit must be >= 1, got 0"),
        (["{prompts}", "--max-tokens", "0"], "max_tokens must be >= 1, got 0"),
        (["{prompts}", "--drafter", "none"], "--drafter must name one, got 'none'"),
        (["{prompts}", "--drafter", "no-such-drafter"], "no-such-drafter"),
        (["{prompts}", "--out", "{prompts}/x.json"], "cannot write to"),
        (["{prompts}", "--out", "{directory}"], "--out must be a file"),
        (["{prompts}", "--compare", "{prompts}"], "--compare takes results only"),
        (["--compare", "{prompts}"], "cannot be read"),
        (["{prompts}.missing"], "not found"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_one_line(
    arguments: list[str], message: str, prompts: Path, capsys
) -> None:
    assert (
        main(["eval", *(text.format(prompts=prompts, directory=prompts.parent) for text in arguments)]) == 2
    )
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.splitlines()) == 1
