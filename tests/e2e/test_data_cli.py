"""`dspark data` from prompts to features and n-grams: also if killed midway, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dspark_core.models.ngram_file import load_ngrams
from dspark_core.training.data.conversations import AnswerFile, read_conversations
from dspark_core.training.manifest import read_manifest
from dspark_core.training.sources import CachedSource
from services.cli.main import main
from services.common.exits import EXIT_CONFIG
from tests.support.source_tree import ROOT
from tests.support.tiny_target import write_tiny_target
from tests.unit.training.answer_files import write_answers

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.timeout(400)]

PROMPTS = [{"id": f"p{n}", "prompt": f"Question number {n}?", "domain": "chat"} for n in range(40)]
SMALL = ["--threads", "1", "--kv-cache-mb", "4"]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_target(tmp_path_factory.mktemp("model") / "target")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return path


MORTAL = """
import os, signal, sys, threading, time
from pathlib import Path
from services.cli.main import main

def watch():
    while not ({when}):
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=watch, daemon=True).start()
sys.exit(main(sys.argv[1:]))
"""


def killed(arguments: list[str], when: str) -> None:
    """Runs the command in a separate process, which kills itself as soon as `when` is true: on a busy machine
    another one may get its turn only when the command has ended."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "proto/gen")])}
    process = subprocess.run(
        [sys.executable, "-c", MORTAL.format(when=when), *arguments],
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=300,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_generation_ends_with_the_same_answers(target: Path, prompts: Path, tmp_path: Path) -> None:
    """In bfloat16, where an answer depends on the other sequences of its passes."""
    options = ["--max-tokens", "100", "--concurrency", "4", "--chunk", "12", "--temperatures", "0:1,0.8:1"]

    def command(out: Path) -> list[str]:
        where = ["--prompts", str(prompts), "--out", str(out), "--target-model", str(target)]
        return ["data", "regenerate", *where, *options, *SMALL]

    broken, whole = tmp_path / "broken.jsonl", tmp_path / "whole.jsonl"
    enough = f"(out := Path({str(broken)!r})).exists() and out.read_bytes().count(b'\\n') >= 15"
    killed(command(broken), when=enough)
    assert 15 <= lines(broken) < len(PROMPTS)
    with broken.open("ab") as file:
        file.write(b'{"id": "p39", "answer_i')  # as if killed during a write
    assert main(command(broken)) == 0
    assert main(command(whole)) == 0
    assert sorted(broken.read_text().splitlines()) == sorted(whole.read_text().splitlines())
    assert lines(whole) == len(PROMPTS)
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert {row["temperature"] for row in rows} == {0.0, 0.8}
    assert {row["domain"] for row in rows} == {"chat"}


@pytest.mark.parametrize("recorded", [False, True])
def test_prompts_that_changed_under_their_ids_are_refused(
    recorded: bool, target: Path, prompts: Path, tmp_path: Path, capsys
) -> None:
    where = ["--target-model", str(target), *SMALL, "--prompts", str(prompts), "--max-tokens", "2"]
    if recorded:  # new answers with features from before
        where += ["--features", str(tmp_path / "features")]
    outs = [tmp_path / f"{name}.jsonl" for name in ("first", "second" if recorded else "first")]
    assert main(["data", "regenerate", *where, "--out", str(outs[0])]) == 0
    prompts.write_text(prompts.read_text().replace("Question number 7?", "Question seven?"))
    assert main(["data", "regenerate", *where, "--out", str(outs[1])]) == EXIT_CONFIG
    told = "holds those of other answers" if recorded else f"{outs[1]} answers another prompt with id 'p7'"
    assert told in capsys.readouterr().err


def test_killed_features_end_with_the_same_bytes(target: Path, tmp_path: Path) -> None:
    answers = write_answers(tmp_path / "answers.jsonl", count=500)

    def command(out: Path) -> list[str]:
        where = ["--answers", str(answers), "--out", str(out), "--target-model", str(target)]
        return ["data", "features", *where, "--shard-tokens", "128", "--threads", "1"]

    broken, whole = tmp_path / "broken", tmp_path / "whole"
    killed(command(broken), when=f"len(list(Path({str(broken)!r}).glob('*.safetensors'))) >= 3")
    manifest = read_manifest(broken)
    assert manifest is not None
    assert not manifest.complete
    assert main(command(broken)) == 0
    assert main(command(whole)) == 0
    assert read_manifest(broken) == read_manifest(whole)
    assert main(["data", "check", str(broken)]) == 0
    source = CachedSource.open([broken])
    assert len(source) == len(AnswerFile(answers))
    assert source.origin is not None
    assert source.origin.vocab_size == 512


def test_prompts_answers_and_features_fit_together(
    target: Path, prompts: Path, tmp_path: Path, capsys
) -> None:
    bench, kept = tmp_path / "bench.jsonl", tmp_path / "kept.jsonl"
    bench.write_text(json.dumps({"turns": ["question number 7"]}) + "\n")
    model = ["--target-model", str(target)]
    collect = ["data", "prompts", str(prompts), "--exclude", str(bench), "--out", str(kept), "--limit", "9"]
    assert main([*collect, *model]) == 0
    assert "8 prompts" in (shown := capsys.readouterr().out)
    assert "1 shared with an excluded file" in shown
    answers, features = tmp_path / "answers.jsonl", tmp_path / "features"
    answer = ["data", "regenerate", "--prompts", str(kept), "--out", str(answers), "--max-tokens", "6"]
    assert main([*answer, *model, *SMALL]) == 0
    recorded = tmp_path / "recorded"
    both = ["--out", str(tmp_path / "again.jsonl"), "--features", str(recorded), "--layers", "1", "3"]
    assert main([*answer, *both, *model, *SMALL]) == 0
    assert (tmp_path / "again.jsonl").read_text() == answers.read_text()
    assert main(["data", "check", str(recorded)]) == 0
    source = CachedSource.open([recorded], tap_layers=[3])
    assert len(source) == len(AnswerFile(answers, min_answer_tokens=2))
    capsys.readouterr()
    compute = ["data", "features", "--answers", str(answers), "--out", str(features), *model]
    assert main([*compute, "--dry-run"]) == 0
    assert not features.exists()
    assert "bytes per token" in capsys.readouterr().out
    assert main(compute) == 0
    assert main(["data", "check", str(features)]) == 0
    assert "1 of 1 shards are intact" in capsys.readouterr().out
    [shard] = features.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert main(["data", "check", str(features)]) == 1
    assert f"{shard} does not have the checksum" in (shown := capsys.readouterr().out)
    assert "delete damaged shards" in shown
    shard.unlink()
    assert main(compute) == 0
    assert main(["data", "check", str(features)]) == 0


def test_a_table_of_ngrams_from_answers(target: Path, tmp_path: Path, capsys) -> None:
    answers, more = (write_answers(tmp_path / f"{name}.jsonl", count=120) for name in ("a", "b"))
    out = tmp_path / "made" / "ngrams.safetensors"
    command = ["data", "ngrams", "--answers", str(answers), str(more), "--out", str(out), "--order", "3"]
    assert main([*command, "--target-model", str(target), "--threads", "1"]) == 0
    table, origin = load_ngrams(out)
    assert (table.order, origin.vocab_size) == (3, 512)
    assert origin.answer_tokens == 2 * sum(len(one.answer_ids) for one in read_conversations(answers))
    shown = capsys.readouterr().out
    assert f"{table.entries:,} contexts from {origin.answer_tokens:,} answer tokens" in shown
    assert "repetitions in their own text" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prompts", "--out", "{tmp}/x"], "no source: give files, --dataset NAME or --synthesise N"),
        (["prompts", "{tmp}/none.jsonl", "--out", "{tmp}/x"], "none.jsonl cannot be read"),
        (["prompts", "{bad}", "--out", "{tmp}/x"], "bad.jsonl:2 has no turns"),
        (["prompts", "{prompts}", "--out", "{tmp}"], "--out must be a file"),
        (["prompts", "{prompts}", "--out", "{tmp}/x", "--min-tokens", "900"], "no prompts are left"),
        (["prompts", "--synthesise", "5", "--out", "{tmp}/x", "--min-tokens", "256"], "must be below 256"),
        (["regenerate", "--prompts", "{bad}", "--out", "{tmp}/x"], "bad.jsonl:2 has no turns"),
        (["regenerate", "--prompts", "{twice}", "--out", "{tmp}/x"], "two prompts with id 'a'"),
        (["regenerate", "--prompts", "{prompts}", "--out", "{tmp}/x", "--temperatures", "hot"], "'hot'"),
        (["regenerate", "--prompts", "{prompts}", "--out", "{tmp}/x", "--top-p", "2"], "top_p must be"),
        (["regenerate", "--prompts", "{prompts}", "--out", "{tmp}/x", "--endpoint", "here"], "got 'here'"),
        (["regenerate", "--prompts", "{prompts}", "--out", "{tmp}/x", "--layers", "1"], "needs --features"),
        (
            [
                *("regenerate", "--prompts", "{prompts}", "--out", "{tmp}/x", "--features", "{tmp}/f"),
                *("--endpoint", "http://127.0.0.1:9"),
            ],
            "--features cannot be used with --endpoint",
        ),
        (["features", "--answers", "{prompts}", "--out", "{tmp}/x"], "prompts.jsonl:1: not a conversation"),
        (["features", "--answers", "{prompts}", "--out", "{tmp}/x", "--layers", "99"], "tap layer 99"),
        (["features", "--answers", "{foreign}", "--out", "{tmp}/x"], "with fingerprint 0123"),
        (
            ["features", "--answers", "{few}", "--out", "{tmp}/x", "--device", "gpu"],
            "device must be auto, cpu",
        ),
        (["regenerate", "--prompts", "{prompts}", "--out", "{tmp}/x", "--device", "cuda:99"], "'cuda:99'"),
        (["check", "{tmp}"], "has no manifest.json"),
        (["ngrams", "--answers", "{foreign}", "--out", "{tmp}/x"], "with fingerprint 0123"),
        (["ngrams", "--answers", "{few}", "--out", "{tmp}/x"], "answers are too few for a table"),
        (["ngrams", "--answers", "{empty}", "--out", "{tmp}/x"], "0 answers are too few for a table"),
        (["ngrams", "--answers", "{wild}", "--out", "{tmp}/x"], "--answers contain token 512; the target's"),
        (["ngrams", "--answers", "{few}", "--out", "{tmp}"], "--out must be a file"),
        (["ngrams", "--answers", "{few}", "--out", "{tmp}/x", "--order", "0"], "--order must be in [1, 8]"),
    ],
)
def test_bad_input_is_told_in_one_line(
    arguments: list[str], message: str, target: Path, prompts: Path, tmp_path: Path, capsys
) -> None:
    files = {name: tmp_path / f"{name}.jsonl" for name in ("bad", "twice", "foreign", "few", "wild", "empty")}
    files["bad"].write_text('{"prompt": "fine"}\n{"id": "x"}\n')
    files["twice"].write_text('{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}\n')
    write_answers(files["foreign"])
    write_answers(files["few"])
    files["empty"].touch()
    files["wild"].write_text('{"prompt_ids": [1], "answer_ids": [2, 512]}\n')
    settings = {"target": "other", "fingerprint": "0123"}
    files["foreign"].with_name("foreign.jsonl.settings.json").write_text(json.dumps(settings))
    named = [text.format(tmp=tmp_path, prompts=prompts, **files) for text in arguments]
    if named[0] != "check":
        named += ["--target-model", str(target)]
    assert main(["data", *named]) > 0
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.splitlines()) == 1
