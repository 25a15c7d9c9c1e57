"""The folder of a training: one run at a time, none lost, no half-written files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from dspark_core.models import drafter_checkpoint
from dspark_core.training import averaging
from dspark_core.training.file_lock import lock
from dspark_core.training.run_log import read_log
from services.cli.main import main
from services.common.exits import EXIT_CONFIG, EXIT_FAILURE
from tests.unit.services.cli.tiny_training import train, write_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def test_a_run_in_the_output_is_neither_mixed_nor_lost(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config, "--set", "optimisation.steps=2") == 0
    assert train(config) == EXIT_CONFIG
    assert "--resume continues it, --fresh deletes it" in capsys.readouterr().err
    assert train(config, "--resume", "--set", "drafter.block_size=5") == EXIT_CONFIG
    assert "drafter.block_size is 5, the run in" in capsys.readouterr().err
    assert train(config, "--fresh", "--set", "data.shards=[nowhere]") == EXIT_CONFIG
    assert (tmp_path / "run/checkpoints/step-00000002.pt").exists()  # a typing error must not cost a run
    assert train(config, "--fresh", "--set", "drafter.block_size=5", "--set", "optimisation.steps=2") == 0
    written = json.loads((tmp_path / "run/drafter/config.json").read_text())
    assert written["block_size"] == 5
    assert [row["step"] for row in read_log(tmp_path / "run/log.jsonl")] == [1, 2]


def test_a_directory_has_one_run_at_a_time(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "run/lock").open("wb") as held:
        lock(held.fileno(), "a run")
        assert train(config) == EXIT_CONFIG
        assert f"another process is writing a run in {tmp_path / 'run'}" in capsys.readouterr().err
    assert train(config) == 0


@pytest.mark.parametrize("damaged", ["", "[]", '{"target": 1}'])
def test_a_run_whose_configuration_cannot_be_read_is_not_lost(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damaged: str
) -> None:
    assert train(config, "--set", "optimisation.steps=2") == 0
    recorded = tmp_path / "run/config.json"
    recorded.write_text(damaged)
    assert train(config, "--resume", "--set", "optimisation.steps=4") == EXIT_CONFIG
    assert "delete it to go on without comparing" in capsys.readouterr().err
    recorded.unlink()
    assert train(config, "--resume", "--set", "optimisation.steps=4") == 0
    assert [row["step"] for row in read_log(tmp_path / "run/log.jsonl")] == [1, 2, 3, 4]


def test_a_run_that_is_past_its_end_is_not_gone_on_with(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(config, "--set", "optimisation.steps=4") == 0
    assert train(config, "--resume", "--set", "optimisation.steps=2") == EXIT_CONFIG
    assert "optimisation.steps is 2, the run is at step 4 already" in capsys.readouterr().err
    assert train(config, "--resume", "--set", "optimisation.steps=4") == 0


def test_a_damaged_log_is_no_reason_to_stop(config: Path, tmp_path: Path) -> None:
    assert train(config, "--set", "optimisation.steps=2") == 0
    log = tmp_path / "run/log.jsonl"
    log.write_bytes(b"\x00\x00\n" + log.read_bytes() + b'[1]\n{"step')
    assert train(config, "--resume", "--set", "optimisation.steps=4") == 0
    assert [row["step"] for row in read_log(log)] == [1, 2, 3, 4]


def test_a_full_disk_that_holds_the_run_already_has_room_for_it(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = ["--set", f"output.directory={tmp_path / 'else'}", "--set", "output.keep=2"]
    assert train(config, "--set", "optimisation.steps=6") == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_500_000))
    assert train(config, *elsewhere) == EXIT_CONFIG
    assert re.search(r"the run needs \d\.\d\d MB .*, 1\.50 MB are free", capsys.readouterr().err)
    assert train(config, "--resume", "--set", "output.keep=2") == 0
    assert train(config, "--fresh", "--set", "output.keep=2") == 0


def test_a_disk_that_fills_up_ends_the_run_in_words_and_leaves_no_half(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = ["--set", "drafter.draft_vocab=null"]
    assert train(config, *whole, "--set", "optimisation.steps=2") == 0

    def half(state: object, file) -> None:
        file.write(b"half")
        raise RuntimeError("unexpected pos 704 vs 598")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", half)
        assert train(config, *whole, "--resume") == EXIT_FAILURE
    told = capsys.readouterr().err
    assert "step-00000004.pt cannot be written: unexpected pos" in told
    assert told.endswith("; --resume continues from the last checkpoint\n")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000002.pt"]

    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(drafter_checkpoint, "save_tensors", full)
        assert train(config, *whole, "--resume") == EXIT_FAILURE
    assert "No space left on device; --resume continues" in capsys.readouterr().err
    monkeypatch.setattr(averaging, "save_tensors", full)
    run = str(tmp_path / "run/drafter")
    assert main(["train", "average", str(tmp_path / "mean"), run, run]) == EXIT_FAILURE
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.glob("mean*"))


def test_a_run_without_a_checkpoint_leaves_no_vocabulary_behind(config: Path, tmp_path: Path) -> None:
    assert train(config, "--set", "optimisation.steps=1") == 0
    shutil.rmtree(tmp_path / "run/checkpoints")  # as if killed before the first
    again = ["--set", "optimisation.steps=1", "--set", "drafter.draft_vocab=128"]
    assert train(config, "--resume", *again) == 0
    assert json.loads((tmp_path / "run/drafter/config.json").read_text())["draft_vocab_size"] == 128
