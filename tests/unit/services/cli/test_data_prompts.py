"""`dspark data prompts`, where it must not lose what is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.cli.data import prompts as data_prompts
from services.cli.main import main
from services.common.exits import EXIT_CONFIG
from tests.support.tiny_target import write_tiny_target


class Counting:
    """A target that never writes the same turn twice."""

    def __init__(self, _generator: object, _tokenizer: object, settings, **_: object) -> None:
        self._size = settings.chunk_turns

    def chunk(self, number: int) -> list[str]:
        return [f"What is {number * self._size + index}?" for index in range(self._size)]


def test_asking_for_more_turns_goes_on_with_those_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_prompts, "Synthesiser", Counting)
    target, out = write_tiny_target(tmp_path / "target"), tmp_path / "prompts.jsonl"
    command = ["data", "prompts", "--out", str(out), "--target-model", str(target), "--kv-cache-mb", "4"]
    assert main([*command, "--synthesise", "4", "--concurrency", "2"]) == 0
    few = out.read_text().splitlines()
    journal = (tmp_path / "prompts.jsonl.turns.jsonl").read_text()
    assert main([*command, "--synthesise", "40", "--concurrency", "3"]) == 0
    many = out.read_text().splitlines()
    assert (len(few), len(many)) == (4, 40)
    assert many[:4] == few
    assert (tmp_path / "prompts.jsonl.turns.jsonl").read_text().startswith(journal)


def test_its_own_sources_are_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"prompt": "Hi there"}\n')
    (tmp_path / "folder").mkdir()
    out = str(tmp_path / "folder" / ".." / "prompts.jsonl")
    assert main(["data", "prompts", str(source), "--out", out]) == EXIT_CONFIG
    assert f"--out would overwrite {out}, which is an input" in capsys.readouterr().err
    assert source.read_text() == '{"prompt": "Hi there"}\n'
