"""What commands that load a model refuse before they do, with status 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import SafetensorError

from dspark_core.errors import DSparkError
from dspark_core.models import ngram_file
from dspark_core.tokenization.tokenizer import Tokenizer, TokenizerParts
from services.cli.clusters import profile
from services.cli.data import features as data_features
from services.cli.data import regenerate as data_regenerate
from services.cli.main import main
from services.cli.output_files import write_output
from services.common.exits import EXIT_CONFIG, EXIT_FAILURE
from tests.support.tiny_tokenizer import tiny_tokenizer
from tests.unit.training.answer_files import write_answers

GOLDEN = Path(__file__).parents[3] / "fixtures" / "golden"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"turns": [text]}) + "\n" for text in ("Hi", "Ho")), encoding="utf-8")
    return path


@pytest.mark.parametrize("command", ["eval", "calibrate"])
@pytest.mark.parametrize(
    ("flag", "value", "rule"),
    [
        ("top-p", "2", "in (0, 1]"),
        ("temperature", "nan", "in [0, 100]"),
        ("temperature", "inf", "in [0, 100]"),
    ],
)
def test_wrong_sampling_is_a_wrong_argument(command, flag, value, rule, prompts: Path, capsys) -> None:
    assert main([command, str(prompts), f"--{flag}", value]) == EXIT_CONFIG
    told = f"dspark: {flag.replace('-', '_')} must be {rule}, got {float(value)}\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(("architecture", "kind"), [(None, "Eagle3"), ("Qwen3MTPModel", "MTP-1")])
def test_a_drafter_of_another_kind_has_no_confidence_head_to_calibrate(
    architecture: str | None, kind: str, prompts: Path, tmp_path: Path, capsys
) -> None:
    fields = json.loads((GOLDEN / "eagle3" / "config.json").read_text(encoding="utf-8"))
    if architecture is not None:
        fields |= {"architectures": [architecture], "target_layer_ids": None}
    drafter = tmp_path / "drafter"
    drafter.mkdir()
    (drafter / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    assert main(["calibrate", str(prompts), "--drafter", str(drafter)]) == EXIT_CONFIG
    assert f"it has no confidence head ({kind} drafters have none)" in capsys.readouterr().err


@pytest.mark.parametrize("below", [[], ["features"]])
def test_features_are_not_written_over_a_file(
    below: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def load(_: object) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr(data_features, "load_target_of", load)
    file = tmp_path / "answers.jsonl"
    file.write_text("")
    out = file.joinpath(*below)
    assert main(["data", "features", "--answers", str(file), "--out", str(out)]) == EXIT_CONFIG
    assert capsys.readouterr().err == f"dspark: --out must be a directory, got the file {file}\n"


def test_a_target_without_a_chat_template_is_not_loaded_to_be_asked(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr(data_regenerate, "load_engine", load)
    target = str(GOLDEN / "qwen3_tiny_target")
    plain = Tokenizer(TokenizerParts(backend=tiny_tokenizer()))
    monkeypatch.setattr(data_regenerate, "load_tokenizer_of", lambda _: plain)
    out = tmp_path / "answers.jsonl"
    command = ["data", "regenerate", "--prompts", str(prompts), "--out", str(out), "--target-model", target]
    assert main(command) == EXIT_CONFIG
    assert f"--target-model {target} has no chat template" in capsys.readouterr().err
    assert not out.exists()


def test_a_profile_that_cannot_be_written_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def load(_: object) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr(profile, "build_target", load)
    assert main(["profile", "--out", str(tmp_path)]) == EXIT_CONFIG
    assert f"--out must be a file, got the directory {tmp_path}" in capsys.readouterr().err


def test_the_least_answers_of_a_table_are_told_by_its_help(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["data", "ngrams", "--help"])
    assert "Needs at least 100 answers." in " ".join(capsys.readouterr().out.split())


def test_a_result_that_finds_no_room_names_its_file() -> None:
    with pytest.raises(DSparkError, match=r"^/dev/full cannot be written: .*No space left on device"):
        write_output(Path("/dev/full"), "figures")


def test_a_table_of_ngrams_that_finds_no_room_is_told_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(ngram_file, "save_arrays", full)
    answers = write_answers(tmp_path / "answers.jsonl", count=120)
    target = GOLDEN / "qwen3_tiny_target"
    command = ["data", "ngrams", "--answers", str(answers), "--out", str(tmp_path / "n.safetensors")]
    assert main([*command, "--target-model", str(target)]) == EXIT_FAILURE
    assert "No space left on device; run the same command again" in capsys.readouterr().err
